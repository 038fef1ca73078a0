//! One placement: the stream to an agent, from `Place` to `Trailer`.
#![allow(clippy::disallowed_methods)] // the rim: this is where time passes

use std::time::Duration;

use bytes::{Bytes, BytesMut};
use forebay_link::{FrameReceiver, FrameSender, OpenError, SendError};
use forebay_proto::Millis;
use forebay_proto::frame::{Frame, Kind, MAX_TEXT_BYTES};
use forebay_proto::wire::work;
use tokio::sync::Notify;
use tokio::time::{Instant, timeout_at};

use crate::core::error::{ApiError, Code};
use crate::core::retry::Failure;
use crate::events::{Event, ReplyHead, Sink};
use crate::exchange::{Exchange, died};
use crate::shared::{BodyBudget, Phase, Placement};

/// Bodies up to this size are sent at once, without waiting to be accepted.
const EAGER_BYTES: usize = 64 << 10;
/// Bytes of an answer that is not a stream that are held back, so that it can be retried whole; fewer where
/// memory is short.
const HELD_BACK_BYTES: usize = 1 << 20;
/// From the first byte to the last; the agent ends what takes longer.
const LONGEST_ANSWER_MS: u32 = 3_600_000;
/// How long an agent may take to accept or refuse.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);

/// How a placement ended.
pub(crate) enum Ended {
    /// All was passed on.
    Complete,
    /// Not started: the worker has more before it than was thought, and said what.
    Stale,
    /// Not started; `for_good`: this worker is not to be asked again.
    Refused { for_good: bool },
    /// Failed before the first byte.
    Failed(Failure),
    /// Failed before the first byte, and another try would be no better.
    Hopeless(ApiError),
    /// Failed after the first byte, or nobody listens any more.
    Broken(ApiError),
}

impl Ended {
    /// For whoever asks later what became of a placement.
    pub(crate) const fn word(&self) -> &'static str {
        match self {
            Self::Complete => "complete",
            Self::Stale => "refused: more is before it than was thought",
            Self::Refused { .. } => "refused",
            Self::Failed(Failure::WorkerLost) => "the worker was lost",
            Self::Failed(_) | Self::Hopeless(_) => "failed before the first byte",
            Self::Broken(_) => "broke off, or its client left",
        }
    }
}

impl Exchange {
    /// Carries the request to the worker that it is booked on, and the answer back.
    pub(crate) async fn attempt(
        &mut self,
        mut placement: Placement,
        attempt: u32,
        must_queue: bool,
        sink: &mut Sink,
    ) -> Ended {
        let (mut sender, mut receiver) = match placement.link.open() {
            Ok(streams) => streams,
            Err(OpenError::Full | OpenError::Lost) => return Ended::Refused { for_good: false },
        };
        let accepted = Notify::new();
        let place = self.place_frame(&placement, attempt, must_queue);
        let body = self.body.text.expose().clone();
        let room = self.shared.hold_body();
        let mut answer = Answer {
            exchange: self,
            placement: &mut placement,
            sink,
            accepted: &accepted,
            attempt,
            head: None,
            held: BytesMut::new(),
            room,
            passing: false,
            taken: false,
        };
        {
            let sending = send_request(&mut sender, place, body, &accepted);
            let relaying = answer.relay(&mut receiver);
            tokio::pin!(sending, relaying);
            tokio::select! {
                biased;
                ended = &mut relaying => ended,
                // What cannot be sent any more is told by the other direction.
                _ = &mut sending => relaying.await,
            }
        }
    }

    fn place_frame(&self, placement: &Placement, attempt: u32, must_queue: bool) -> Frame {
        Frame::message(Kind::Place, &self.header(placement, attempt, must_queue))
    }

    /// The header of a placement there.
    pub(crate) fn header(
        &self,
        placement: &Placement,
        attempt: u32,
        must_queue: bool,
    ) -> work::Place {
        let expected = placement.choice;
        let targets = self.targets(expected.work.context_tokens);
        work::Place {
            request_id: self.request_id.to_string(),
            incarnation: Some(placement.choice.incarnation.to_wire()),
            model: self.model.to_string(),
            tenant: self.tenant.to_string(),
            path: self.path.into(),
            body_bytes: self.body.text.len() as u64,
            stream: self.head.stream,
            max_tokens: self.head.max_tokens.map_or(0, saturated),
            cache_salt: self.prompt.salt.clone(),
            chunks: self.chunks_for(placement.choice.incarnation.worker),
            prompt_bytes: self.prompt.bytes,
            chunk_bytes: self.pool.chunk_bytes,
            key_epoch: self.prompt.key_epoch,
            prompt_tokens: placement.choice.prompt_tokens(),
            expected_cached_tokens: placement.choice.cached_tokens,
            deadline_ms: self
                .pool
                .first_byte_timeout_ms
                .saturating_add(LONGEST_ANSWER_MS),
            expected_wait_ms: expected.wait.map(|wait| Millis::from_duration(wait).wire()),
            expected_ttft_ms: expected
                .wait
                .map(|_| Millis::from_duration(expected.ttft).wire()),
            ttft_target_ms: Some(whole(targets.ttft_ms)),
            tpot_target_ms: Some(whole(targets.tpot_ms)),
            attempt,
            must_queue,
            facts_revision: self.revision,
            zone: self.zone.as_deref().unwrap_or_default().into(),
            shadow: false,
            suspect_key: if self.pool.quarantine {
                self.prompt.named
            } else {
                0
            },
            suspect_epoch: self.prompt.named_epoch,
            shape: self.prompt.shape.clone(),
            suspected: self.verdict().suspected,
        }
    }
}

fn saturated(number: u64) -> u32 {
    u32::try_from(number).unwrap_or(u32::MAX)
}

#[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)] // it saturates
const fn whole(ms: f64) -> u32 {
    ms as u32
}

/// Sends a request, and all that there will be: who gives it up from here on stops reading the answer.
pub(crate) async fn send_request(
    sender: &mut FrameSender,
    place: Frame,
    mut body: Bytes,
    accepted: &Notify,
) -> Result<(), SendError> {
    let end = Frame::new(Kind::BodyEnd, Bytes::new());
    if body.len() > EAGER_BYTES {
        sender.send(&place).await?;
        accepted.notified().await;
        while body.len() > MAX_TEXT_BYTES {
            let piece = body.split_to(MAX_TEXT_BYTES);
            sender.send(&Frame::new(Kind::Body, piece)).await?;
        }
        let last = Frame::new(Kind::Body, body);
        sender.send_all(&[last, end]).await?;
    } else {
        let body = Frame::new(Kind::Body, body);
        sender.send_all(&[place, body, end]).await?;
    }
    sender.finish();
    Ok(())
}

/// The answer to one placement, as far as it has come.
struct Answer<'a> {
    exchange: &'a mut Exchange,
    placement: &'a mut Placement,
    sink: &'a mut Sink,
    accepted: &'a Notify,
    attempt: u32,
    head: Option<work::Head>,
    held: BytesMut,
    /// For what is held.
    room: BodyBudget,
    /// Data go to the client as they come.
    passing: bool,
    taken: bool,
}

/// Goes on, or ends.
type Step = Result<(), Ended>;

impl Answer<'_> {
    async fn relay(&mut self, receiver: &mut FrameReceiver) -> Ended {
        let dispatched = Instant::now();
        let pool = &self.exchange.pool;
        let first_byte = dispatched + Duration::from_millis(pool.first_byte_timeout_ms.into());
        let idle = Duration::from_millis(pool.idle_timeout_ms.into());
        let mut any_data = false;
        loop {
            let until = if !self.taken {
                (dispatched + ANSWER_TIMEOUT).min(first_byte)
            } else if any_data {
                Instant::now() + idle
            } else {
                first_byte
            };
            let frame = match timeout_at(until, receiver.recv()).await {
                Ok(Ok(Some(frame))) => frame,
                // The end without a trailer: the worker died.
                Ok(Ok(None) | Err(_)) => return self.failed(Failure::WorkerLost),
                Err(_) if !self.taken => return Ended::Failed(Failure::Failed),
                Err(_) => return self.late(),
            };
            any_data |= frame.kind == Kind::Data;
            if let Err(ended) = self.step(frame).await {
                return ended;
            }
        }
    }

    async fn step(&mut self, frame: Frame) -> Step {
        let broken = || Ended::Failed(Failure::Failed);
        match frame.kind {
            Kind::Accepted if !self.taken => {
                let accepted: work::Accepted = frame.decode().map_err(|_| broken())?;
                self.taken = true;
                self.exchange.shared.dispatch().asking.placed(false);
                self.placement.accepted(accepted.report_seq);
                self.hear(accepted.load.as_ref());
                self.accepted.notify_one();
                Ok(())
            }
            Kind::Refused if !self.taken => {
                let refused: work::Refused = frame.decode().map_err(|_| broken())?;
                self.hear(refused.load.as_ref());
                if let Some(kept) = &self.placement.kept {
                    kept.end(said(refused.reason()));
                }
                Err(refusal(refused.reason()))
            }
            Kind::Head if self.taken && self.head.is_none() => {
                let head: work::Head = frame.decode().map_err(|_| broken())?;
                match head.status {
                    503 => return Err(Ended::Refused { for_good: true }),
                    500..=599 => return Err(broken()),
                    100..=199 | 0 => return Err(broken()),
                    _ => self.head = Some(head),
                }
                Ok(())
            }
            Kind::Data if self.head.is_some() => self.data(frame.payload).await,
            Kind::Trailer if self.taken => {
                let trailer: work::Trailer =
                    frame.decode().map_err(|_| self.failed(Failure::Failed))?;
                Err(self.trailer(&trailer).await)
            }
            // Out of order: the agent broke the protocol.
            _ => Err(self.failed(Failure::Failed)),
        }
    }

    async fn data(&mut self, piece: Bytes) -> Step {
        if self.passing {
            return self.sink.send(Event::Data(piece)).await;
        }
        if self.held.is_empty() && self.is_stream() {
            self.begin(None).await?;
            return self.sink.send(Event::Data(piece)).await;
        }
        self.held.extend_from_slice(&piece);
        let fits = self.held.len() <= HELD_BACK_BYTES && self.room.take_spare(piece.len() as u64);
        if !fits {
            self.begin(None).await?;
            self.flush().await?;
            self.room = self.exchange.shared.hold_body();
        }
        Ok(())
    }

    /// Lets the client see that there is an answer. From here on nothing is retried.
    async fn begin(&mut self, whole: Option<Bytes>) -> Step {
        self.passing = true;
        self.exchange.body.forget();
        self.exchange.tracked.phase(Phase::Decode);
        let age = self.exchange.tracked.age();
        self.exchange.shared.metrics.first_byte(age);
        let streaming = self.is_stream();
        let head = self.head.as_ref().expect("data come after a head");
        let header = |name: &str| {
            let mut headers = head.headers.iter();
            headers
                .find(|header| header.key.eq_ignore_ascii_case(name))
                .map(|header| header.value.clone())
        };
        let event = Event::Head(ReplyHead {
            status: u16::try_from(head.status).unwrap_or(502),
            content_type: header("content-type").unwrap_or_else(|| "application/json".into()),
            retry_after: header("retry-after"),
            streaming,
            worker: self.placement.worker.clone(),
            attempts: self.attempt,
            whole,
        });
        self.sink.send(event).await
    }

    async fn flush(&mut self) -> Step {
        if self.held.is_empty() {
            return Ok(());
        }
        let held = self.held.split().freeze();
        self.sink.send(Event::Data(held)).await
    }

    fn is_stream(&self) -> bool {
        let events = |header: &forebay_proto::wire::Label| {
            header.key.eq_ignore_ascii_case("content-type")
                && header.value.starts_with("text/event-stream")
        };
        self.exchange.head.stream
            && self
                .head
                .as_ref()
                .is_some_and(|head| head.status == 200 && head.headers.iter().any(events))
    }

    async fn trailer(&mut self, trailer: &work::Trailer) -> Ended {
        self.placement.over_by(trailer.report_seq);
        self.hear(trailer.load.as_ref());
        let Placement { worker, choice, .. } = &*self.placement;
        self.exchange.learn(worker, trailer, choice.cached_tokens);
        let died = choice.incarnation.worker;
        self.exchange.died_under(died, trailer.share);
        match trailer.end() {
            work::End::Complete if self.head.is_some() => self.complete().await,
            work::End::NotStarted if !self.sink.begun() => Ended::Refused { for_good: true },
            work::End::Timeout => self.late(),
            work::End::Drained => self.drained(),
            work::End::Complete
            | work::End::NotStarted
            | work::End::EngineFailed
            | work::End::Cancelled
            | work::End::Unspecified => self.failed(Failure::Failed),
        }
    }

    async fn complete(&mut self) -> Ended {
        self.exchange.ran_well();
        if self.passing {
            return Ended::Complete;
        }
        let whole = self.held.split().freeze();
        match self.begin(Some(whole)).await {
            Ok(()) => Ended::Complete,
            Err(ended) => ended,
        }
    }

    fn failed(&self, failure: Failure) -> Ended {
        if self.sink.begun() {
            Ended::Broken(ApiError::new(
                Code::UpstreamError,
                "the worker failed in the middle of its answer",
            ))
        } else {
            Ended::Failed(failure)
        }
    }

    fn late(&self) -> Ended {
        if self.sink.begun() {
            Ended::Broken(ApiError::new(
                Code::UpstreamTimeout,
                "the rest of the answer did not come in time (see the pool's idle_timeout_ms)",
            ))
        } else {
            Ended::Hopeless(ApiError::new(
                Code::UpstreamTimeout,
                "the answer did not come in time (see the pool's first_byte_timeout_ms)",
            ))
        }
    }

    /// A drain's deadline passed. Before the first byte another worker makes the answer.
    fn drained(&self) -> Ended {
        if self.sink.begun() {
            Ended::Broken(ApiError::new(
                Code::WorkerDrained,
                "the worker was taken out of service before the answer was complete: send the request again",
            ))
        } else {
            Ended::Refused { for_good: true }
        }
    }

    fn hear(&self, load: Option<&work::LoadReport>) {
        if let Some(load) = load {
            let worker = self.placement.choice.incarnation.worker;
            self.exchange.shared.hear(load, worker);
        }
    }
}

fn said(reason: work::RefusalReason) -> &'static str {
    use work::RefusalReason as Reason;
    match reason {
        Reason::RefusalStaleView => "refused: more is before it than was thought",
        Reason::RefusalWrongModel => "refused: it does not serve the model",
        Reason::RefusalWrongZone => "refused: it is in another zone",
        Reason::RefusalWrongTenant => "refused: its engine's cache is another tenant's",
        Reason::RefusalInvalid => "refused: it did not understand the placement",
        Reason::RefusalUnspecified => "refused",
        Reason::RefusalFenced => "refused: another start of it serves",
        Reason::RefusalEngineDown => "refused: its engine is down",
        Reason::RefusalCordoned => "refused: cordoned",
        Reason::RefusalDraining => "refused: draining",
        Reason::RefusalFull => "refused: full",
        Reason::RefusalDeadline => "refused: it could not start in time",
        Reason::RefusalBodyBudget => "refused: no memory for its body",
    }
}

fn refusal(reason: work::RefusalReason) -> Ended {
    use work::RefusalReason as Reason;
    match reason {
        Reason::RefusalStaleView => Ended::Stale,
        Reason::RefusalWrongModel | Reason::RefusalWrongZone | Reason::RefusalWrongTenant => {
            Ended::Refused { for_good: true }
        }
        Reason::RefusalInvalid => Ended::Hopeless(died()),
        Reason::RefusalUnspecified
        | Reason::RefusalFenced
        | Reason::RefusalEngineDown
        | Reason::RefusalCordoned
        | Reason::RefusalDraining
        | Reason::RefusalFull
        | Reason::RefusalDeadline
        | Reason::RefusalBodyBudget => Ended::Refused { for_good: false },
    }
}
