//! One placement: header, answer, body, engine, answer, end.
//!
//! Whatever way this ends, dropping what it holds ends the rest: the ticket frees the slot, the
//! engine's answer closes its connection, the sender resets the stream.

use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use forebay_link::{Code, FrameReceiver, FrameSender};
use forebay_proto::Now;
use forebay_proto::frame::{Frame, Kind, MAX_TEXT_BYTES};
use tokio::time::{Instant, timeout, timeout_at};

use super::aligner::Unaligned;
use super::engine::Answer;
use super::pool::{CallError, Text};
use super::residency;
use super::work::{Call, Patience, Shared, Ticket};
use crate::adapter::{Adapter, Answers, Asked, Events, Ids, Spliced, Verdict, not_started, splice};
use crate::core::{End, Offer, Usage};
use crate::wire;

const END_PATIENCE: Duration = Duration::from_secs(1);
/// Of an error's document, so much is read before it is relayed.
const MAX_ERROR_BYTES: usize = 64 << 10;
/// For that: it is there as a rule.
const ERROR_PATIENCE: Duration = Duration::from_secs(2);
/// For requests that nobody promised a time: engines take the least first.
const LAST: u32 = i32::MAX as u32;

/// Carries one placement of the balancer whose link has this key.
pub(super) async fn carry(
    shared: Arc<Shared>,
    balancer: u64,
    mut sender: FrameSender,
    mut receiver: FrameReceiver,
) {
    let carrying = shared.carrying();
    let patience = shared.patience;
    let header = match timeout(patience.peer, receiver.recv()).await {
        Ok(Ok(Some(frame))) if frame.kind == Kind::Place => frame,
        Ok(Ok(Some(frame))) if frame.kind == Kind::Follow => {
            drop(carrying);
            return residency::tell(shared, frame, sender, receiver).await;
        }
        Ok(Ok(_)) | Err(_) => return give_up(&mut sender, &mut receiver, Code::Protocol),
        Ok(Err(_)) => return,
    };
    let offer = wire::offer(&header);
    match (shared.place(offer.as_ref()), offer) {
        (Ok((admitted, ticket)), Some(offer)) => {
            shared.taken(balancer);
            let deadline = Instant::now() + offer.deadline;
            let engine_id = ticket.engine_id(&offer);
            let mut carried = Carried {
                shared,
                patience,
                stopped: Box::pin(sender.stopped()),
                sender,
                receiver,
                offer,
                engine_id,
                at_end: false,
                inside_a_frame: false,
                share: 0,
            };
            let accepted = wire::accepted(&admitted);
            // Other streams may have used the connection's window up.
            let sent = timeout(patience.peer, carried.sender.send(&accepted)).await;
            if let Ok(Ok(())) = sent {
                carried.run(ticket, deadline).await;
            }
        }
        (Err(refused), _) => {
            // A balancer that is gone needs no answer.
            let sent = timeout(patience.peer, sender.send(&wire::refused(&refused))).await;
            if let Ok(Ok(())) = sent {
                finish(&mut sender).await;
            }
        }
        (Ok(_), None) => unreachable!("only an offer is admitted"),
    }
}

fn give_up(sender: &mut FrameSender, receiver: &mut FrameReceiver, code: Code) {
    sender.reset(code);
    receiver.stop(code);
}

/// Ends the stream and waits, not for long, until its end has arrived.
async fn finish(sender: &mut FrameSender) {
    sender.finish();
    // A balancer that does not take the end in time learns it by the connection's.
    let _ = timeout(END_PATIENCE, sender.stopped()).await;
}

struct Carried {
    shared: Arc<Shared>,
    patience: Patience,
    sender: FrameSender,
    /// Ends when the balancer takes no more: asked for once, looked at again and again.
    stopped: Pin<Box<dyn Future<Output = Option<u64>> + Send>>,
    receiver: FrameReceiver,
    offer: Offer,
    /// Under which the engine knows it.
    engine_id: String,
    /// The balancer has nothing more to say.
    at_end: bool,
    /// A frame was begun and is not sent whole: no other may follow.
    inside_a_frame: bool,
    /// What is held against it of the engine's death.
    share: u32,
}

/// An answer as it passes.
enum Reading {
    Events(Events),
    Whole(Answers),
}

impl Reading {
    fn push(&mut self, piece: Bytes) -> Bytes {
        match self {
            Self::Events(events) => events.push(piece),
            Self::Whole(answers) => {
                answers.push(&piece);
                piece
            }
        }
    }

    /// The answer's end: what is left of it, what was counted, and whether it is whole.
    fn finish(&mut self) -> (Bytes, Usage, Verdict) {
        match self {
            Self::Events(events) => {
                let (rest, verdict) = events.finish();
                (rest, events.usage(), verdict)
            }
            Self::Whole(answers) => {
                let (usage, verdict) = answers.finish();
                (Bytes::new(), usage, verdict)
            }
        }
    }

    /// Whether nothing more is to come of it.
    fn is_broken(&self) -> bool {
        match self {
            Self::Events(events) => events.is_broken(),
            Self::Whole(_) => false,
        }
    }

    fn usage(&self) -> Usage {
        match self {
            Self::Events(events) => events.usage(),
            Self::Whole(answers) => answers.finish().0,
        }
    }
}

/// How carrying a placement came to its end while its balancer is there.
enum Outcome {
    /// To be told in the trailer.
    Ended(End, String),
    /// The core ended it while it waited.
    Sent(Frame),
}

/// The balancer gave it up or broke the protocol: there is nobody to tell.
struct Gone(Code);

impl Carried {
    async fn run(mut self, mut ticket: Ticket, deadline: Instant) {
        let shared = self.shared.clone();
        let outcome = tokio::select! {
            biased;
            outcome = timeout_at(deadline, self.carry(&mut ticket)) => outcome,
            () = shared.ending() => Ok(Ok(Outcome::Ended(
                End::Drained,
                "the deadline of a drain passed".into(),
            ))),
            () = shared.stalling() => Ok(Ok(Outcome::Ended(
                End::EngineFailed,
                "the engine makes no progress".into(),
            ))),
        };
        let (end, detail) = match outcome {
            Ok(Ok(Outcome::Sent(trailer))) => return self.part(trailer).await,
            Ok(Ok(Outcome::Ended(end, detail))) => (end, detail),
            Err(_) => (End::Timeout, "the deadline passed".to_owned()),
            Ok(Err(Gone(code))) => {
                drop(ticket);
                return give_up(&mut self.sender, &mut self.receiver, code);
            }
        };
        // The slot is free before the balancer hears of it.
        let Some((end, ending)) = ticket.end(end) else {
            return;
        };
        let trailer = wire::trailer(end, &detail, &ending, self.share);
        self.part(trailer).await;
    }

    /// The last frame and the end of the stream.
    async fn part(mut self, trailer: Frame) {
        if self.inside_a_frame {
            return give_up(&mut self.sender, &mut self.receiver, Code::Cancelled);
        }
        if let Ok(Ok(())) = timeout(self.patience.slow_reader, self.sender.send(&trailer)).await {
            finish(&mut self.sender).await;
        }
    }

    async fn carry(&mut self, ticket: &mut Ticket) -> Result<Outcome, Gone> {
        let body = match self.receive(ticket).await? {
            Ok(body) => body,
            Err(over) => return Ok(over),
        };
        let (body, strip_usage, mut unaligned) = self.splice(&body);
        let mut ids = unaligned.is_some().then(Ids::default);
        let shared = self.shared.clone();
        let (path, request_id) = (self.offer.path.clone(), self.engine_id.clone());
        let asked = tokio::select! {
            asked = shared.engine.post(&path, &request_id, body) => asked,
            gone = self.abandoned() => return Err(gone),
        };
        let mut answer = match asked {
            Ok(answer) => answer,
            Err(error) => {
                let end = match error {
                    CallError::NotStarted(_) => {
                        shared.engine_down(&error.to_string());
                        End::NotStarted
                    }
                    CallError::Failed(_) => {
                        self.share = shared.post_mortem(ticket).await;
                        End::EngineFailed
                    }
                };
                return Ok(Outcome::Ended(end, error.to_string()));
            }
        };
        let mut early = None;
        if answer.status() >= 500 {
            let document = beginning(&mut answer).await;
            if let Some(why) = not_started(answer.status(), &document) {
                shared.engine_refused(why);
                return Ok(Outcome::Ended(End::NotStarted, why.detail().to_owned()));
            }
            // An engine that died has a process in front of it that says so, for a moment.
            self.share = shared.post_mortem(ticket).await;
            if self.share > 0 {
                let detail = format!("the engine died: it answered {}", answer.status());
                return Ok(Outcome::Ended(End::EngineFailed, detail));
            }
            early = Some(document);
        }
        let content_type = answer.content_type();
        let events = content_type.is_some_and(|kind| kind.starts_with("text/event-stream"));
        let mut reading = if events {
            let says_why = shared.adapter().says_why_it_ends();
            Reading::Events(Events::new(strip_usage, says_why))
        } else {
            Reading::Whole(Answers::default())
        };
        let head = wire::head(answer.status(), content_type);
        // Engines send the head of a stream before its first token, of anything else behind it.
        let mut first = !events;
        // A refusal has prefilled nothing.
        if first && (200..300).contains(&answer.status()) {
            ticket.first_byte();
        }
        self.send(&head).await?;
        loop {
            let piece = match early.take() {
                Some(document) => Ok(Some(document)),
                None => tokio::select! {
                    piece = answer.next() => piece,
                    gone = self.abandoned() => return Err(gone),
                },
            };
            match piece {
                Ok(Some(piece)) => {
                    shared.heard();
                    let piece = self.without_ids(ids.as_mut(), &mut unaligned, piece);
                    let mut piece = reading.push(piece);
                    if reading.is_broken() && piece.is_empty() {
                        break;
                    }
                    if !std::mem::replace(&mut first, true) {
                        ticket.first_byte();
                    }
                    while !piece.is_empty() {
                        let part = piece.split_to(piece.len().min(MAX_TEXT_BYTES));
                        self.send(&Frame::new(Kind::Data, part)).await?;
                    }
                }
                Ok(None) => break,
                Err(problem) => {
                    ticket.usage(reading.usage());
                    self.share = shared.post_mortem(ticket).await;
                    let detail = format!("the engine broke off: {problem}");
                    return Ok(Outcome::Ended(End::EngineFailed, detail));
                }
            }
        }
        let left = ids.as_mut().map(Ids::finish).unwrap_or_default();
        let left = reading.push(left);
        let (rest, usage, verdict) = reading.finish();
        let rest: Bytes = [left, rest].concat().into();
        ticket.usage(usage);
        if verdict == Verdict::Broken {
            self.share = shared.post_mortem(ticket).await;
            let detail = "the engine failed in the middle of its answer".to_owned();
            return Ok(Outcome::Ended(End::EngineFailed, detail));
        }
        if !rest.is_empty() {
            self.send(&Frame::new(Kind::Data, rest)).await?;
        }
        // Not waited for: the trailer is due.
        tokio::spawn(async move { shared.engine.keep(answer).await });
        Ok(Outcome::Ended(End::Complete, String::new()))
    }

    /// The body as the engine gets it, whether its token counts are to be taken out again, and what is kept
    /// of it where its ids are.
    fn splice(&self, whole: &Bytes) -> (Text, bool, Option<Unaligned>) {
        let adapter = self.shared.adapter();
        if adapter == Adapter::Generic || self.offer.path == "/v1/embeddings" {
            return (Text::of(whole.clone()), false, None);
        }
        let aligner = &self.shared.aligner;
        let unaligned = match adapter {
            Adapter::Vllm => aligner.expect(&self.shared, &self.offer, whole),
            Adapter::Sglang | Adapter::LlamaCpp | Adapter::Generic => None,
        };
        let asked = Asked {
            removed: adapter.removed(),
            cache_salt: self.offer.cache_salt.as_deref().filter(|_| adapter.salts()),
            priority: self.priority().filter(|_| adapter.takes_priority()),
            ids: unaligned.is_some(),
        };
        let Spliced { body, strip_usage } = splice(whole, &asked);
        (body.into_iter().collect(), strip_usage, unaligned)
    }

    /// When the first token is due, in milliseconds since this agent started: whose is due first goes first.
    fn priority(&self) -> Option<u32> {
        if !self.shared.manner.priority {
            return None;
        }
        let promised = Duration::try_from_secs_f64(self.offer.targets.ttft_ms / 1e3);
        let due = promised.map_or(u128::MAX, |promised| {
            (self.shared.now() + promised)
                .since(Now::default())
                .as_millis()
        });
        Some(u32::try_from(due).unwrap_or(LAST).min(LAST))
    }

    /// Takes ids out of a piece of the answer; the prompt's say where its chunks lie.
    fn without_ids(
        &self,
        ids: Option<&mut Ids>,
        unaligned: &mut Option<Unaligned>,
        piece: Bytes,
    ) -> Bytes {
        let Some(ids) = ids else { return piece };
        let piece = ids.push(piece);
        if let Some(prompt) = ids.take_prompt()
            && let Some(unaligned) = unaligned.take()
        {
            self.shared.aligner.align(unaligned, &self.offer, prompt);
        }
        piece
    }

    /// The whole body, once the placement has its slot; or how it was over before.
    async fn receive(&mut self, ticket: &mut Ticket) -> Result<Result<Bytes, Outcome>, Gone> {
        // Admitted: there is memory for as much as was announced.
        let announced = usize::try_from(self.offer.body_bytes).unwrap_or(usize::MAX);
        let mut body = BytesMut::new();
        let (mut whole, mut started) = (false, false);
        let mut last_piece = Instant::now();
        while !(whole && started) {
            tokio::select! {
                biased;
                frame = self.receiver.recv(), if !self.at_end => match frame {
                    Ok(Some(frame)) if frame.kind == Kind::Body && !whole => {
                        if frame.payload.len() > announced - body.len() {
                            return Err(Gone(Code::Protocol));
                        }
                        body.reserve(announced - body.len());
                        body.extend_from_slice(&frame.payload);
                        last_piece = Instant::now();
                    }
                    Ok(Some(frame)) if frame.kind == Kind::BodyEnd && !whole => {
                        whole = true;
                        if body.len() != announced {
                            return Err(Gone(Code::Protocol));
                        }
                    }
                    Ok(None) if whole => self.at_end = true,
                    Ok(_) => return Err(Gone(Code::Protocol)),
                    Err(_) => return Err(Gone(Code::Cancelled)),
                },
                call = &mut ticket.call, if !started => match call {
                    Ok(Call::Start) => started = true,
                    Ok(Call::Over(why, ending)) => {
                        let trailer = wire::trailer(why.end(), why.detail(), &ending, 0);
                        return Ok(Err(Outcome::Sent(trailer)));
                    }
                    // It is told before its sender goes.
                    Err(_) => return Err(Gone(Code::Cancelled)),
                },
                _ = &mut self.stopped => return Err(Gone(Code::Cancelled)),
                () = tokio::time::sleep_until(last_piece + self.patience.peer), if !whole => {
                    return Err(Gone(Code::Cancelled));
                }
            }
        }
        Ok(Ok(body.freeze()))
    }

    /// Sends a frame unless the balancer goes, or takes nothing for too long.
    async fn send(&mut self, frame: &Frame) -> Result<(), Gone> {
        let Self {
            patience,
            sender,
            receiver,
            at_end,
            inside_a_frame,
            ..
        } = self;
        *inside_a_frame = true;
        tokio::select! {
            biased;
            sent = timeout(patience.slow_reader, sender.send(frame)) => match sent {
                Ok(Ok(())) => {
                    *inside_a_frame = false;
                    Ok(())
                }
                Ok(Err(_)) | Err(_) => Err(Gone(Code::Cancelled)),
            },
            gone = reset(receiver, at_end) => Err(gone),
        }
    }

    /// Returns when the balancer has given the placement up.
    async fn abandoned(&mut self) -> Gone {
        let Self {
            stopped,
            receiver,
            at_end,
            ..
        } = self;
        tokio::select! {
            _ = stopped => Gone(Code::Cancelled),
            gone = reset(receiver, at_end) => gone,
        }
    }
}

/// Returns when the balancer reset its direction or said more than it may.
async fn reset(receiver: &mut FrameReceiver, at_end: &mut bool) -> Gone {
    if !*at_end {
        match receiver.recv().await {
            Ok(None) => *at_end = true,
            Ok(Some(_)) => return Gone(Code::Protocol),
            Err(_) => return Gone(Code::Cancelled),
        }
    }
    std::future::pending().await
}

/// What stands at the beginning of an error's document.
async fn beginning(answer: &mut Answer) -> Bytes {
    let mut document = BytesMut::new();
    let reading = async {
        while document.len() < MAX_ERROR_BYTES
            && let Ok(Some(piece)) = answer.next().await
        {
            document.extend_from_slice(&piece);
        }
    };
    // What is late is relayed as it comes.
    let _ = timeout(ERROR_PATIENCE, reading).await;
    document.freeze()
}
