//! A scripted agent over a real link.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use forebay_link::{Alpn, Credentials, Endpoint, FrameReceiver, FrameSender};
use forebay_proto::fleet::WorkerSpec;
use forebay_proto::frame::{Frame, Kind};
use forebay_proto::wire::fleet::Desired;
use forebay_proto::wire::{Label, work};
use forebay_proto::{Incarnation, Revision, WorkerId};
use forebay_scheduler::residency::{Change, Cursor, Grade, Next, Publisher};
use forebay_scheduler::{Acceptance, Known, Load};
use parking_lot::Mutex;
use tokio::runtime::Runtime;
use tokio::sync::{mpsc, watch};

use super::{PATIENCE, loopback};

pub const EVENT: &str = "data: {\"n\":1}\n\n";
pub const REST: &str = "data: {\"n\":2}\n\ndata: [DONE]\n\n";
pub const WHOLE: &str = "{\"object\":\"chat.completion\"}";

/// What an agent does with one placement.
#[derive(Clone, Debug)]
pub enum Act {
    /// Answers: events if the body asks for them.
    Answer,
    Refuse(work::RefusalReason),
    /// Accepts, then ends like this without an answer.
    End(work::End),
    /// Accepts, then the stream breaks.
    Break,
    /// Sends the first part of its answer, then the stream breaks.
    BreakAfterFirst,
    /// Sends the first part of its answer, then ends like this.
    EndAfterFirst(work::End),
    /// Sends the first part of its answer, then a trailer that cannot be read.
    GarbageAfterFirst,
    /// The engine's status, with this body.
    Status(u16, &'static str),
    /// The same after a while.
    LateStatus(u16, &'static str),
    /// Accepts, and says nothing until it is cancelled.
    Hang,
    /// Sends the first part, and nothing more until it is cancelled.
    HangAfterFirst,
    /// Answers after this long.
    Slow(Duration),
    /// Sends events as fast as they are taken.
    Flood,
}

/// What an agent saw.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Saw {
    Placed {
        attempt: u32,
        must_queue: bool,
    },
    /// What a request would meet.
    Asked,
    Body(usize),
    Cancelled,
}

pub type Script = Arc<Mutex<VecDeque<Act>>>;

/// What an engine counted: prompt tokens, and those of them that were cached.
pub type Counts = Arc<Mutex<Option<(u32, Option<u32>)>>>;

pub struct Agent {
    pub endpoint: Option<Endpoint>,
    pub known: Known,
    acts: Script,
    /// Every placement as it came, the oldest first.
    pub placed: Arc<Mutex<Vec<work::Place>>>,
    /// Told in each trailer from then on.
    pub counts: Counts,
    holds: watch::Sender<Vec<(u64, u32)>>,
    pub flooded: Arc<AtomicU64>,
    /// Tokens of any prompt that it says it has, if it answers questions.
    pub quotes: Arc<Mutex<Option<u32>>>,
    pub saw: mpsc::UnboundedReceiver<(Instant, Saw)>,
    runtime: Option<Runtime>,
}

impl Agent {
    /// Tells balancers that its cache holds these chunks, with the tokens up to the end of each.
    pub fn holds(&self, chunks: &[(u64, u32)]) {
        self.holds.send_replace(chunks.to_vec());
    }

    pub fn will(&self, acts: &[Act]) {
        self.acts.lock().extend(acts.iter().cloned());
    }

    /// Stops where it is and says nothing, as after kill -9.
    pub fn dies(&mut self) {
        drop(self.endpoint.take());
        self.runtime.take().unwrap().shutdown_background();
    }

    /// Says goodbye on the link and takes no new one.
    pub fn closes(&mut self) {
        self.endpoint.take().unwrap().close("the test stops it");
    }

    pub async fn sees(&mut self, wanted: &Saw) -> Instant {
        let looking = async {
            loop {
                let (at, saw) = self.saw.recv().await.unwrap();
                if saw == *wanted {
                    return at;
                }
            }
        };
        let found = tokio::time::timeout(PATIENCE, looking).await;
        found.unwrap_or_else(|_| panic!("{wanted:?} was not seen"))
    }

    pub async fn is_placed(&mut self) {
        let looking = async {
            loop {
                let (_, saw) = self.saw.recv().await.unwrap();
                if matches!(saw, Saw::Placed { .. }) {
                    return;
                }
            }
        };
        tokio::time::timeout(PATIENCE, looking).await.unwrap();
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

struct Inside {
    incarnation: Incarnation,
    slots: u32,
    state: Mutex<(u64, u32)>,
    acts: Script,
    next: Script,
    flooded: Arc<AtomicU64>,
    saw: mpsc::UnboundedSender<(Instant, Saw)>,
    placed: Arc<Mutex<Vec<work::Place>>>,
    counts: Counts,
    holds: watch::Receiver<Vec<(u64, u32)>>,
}

impl Inside {
    fn load(&self, change: i32) -> (u64, work::LoadReport) {
        let mut state = self.state.lock();
        state.0 += 1;
        state.1 = state.1.saturating_add_signed(change);
        let load = Load {
            incarnation: self.incarnation,
            seq: state.0,
            acceptance: Acceptance::Open,
            running: state.1,
            queued: 0,
            slots: self.slots,
            queue_limit: 0,
            service: Duration::from_millis(50),
            facts_revision: Revision(1),
            interval: Duration::from_millis(100),
            backlog: Default::default(),
            model: None,
            residuals: forebay_scheduler::model::Residuals::default(),
        };
        (state.0, load.to_wire())
    }

    fn tell(&self, saw: Saw) {
        let _ = self.saw.send((Instant::now(), saw));
    }

    async fn serve(self: Arc<Self>, mut send: FrameSender, mut recv: FrameReceiver) {
        let first = recv.recv().await.unwrap().unwrap();
        if first.kind == Kind::Follow {
            tokio::select! {
                () = self.tell_residency(&mut send) => {}
                _ = recv.recv() => {}
            }
            return;
        }
        let place: work::Place = first.decode().unwrap();
        self.placed.lock().push(place.clone());
        self.tell(Saw::Placed {
            attempt: place.attempt,
            must_queue: place.must_queue,
        });
        let act = self.acts.lock().pop_front();
        let act = act.or_else(|| self.next.lock().pop_front());
        let act = act.unwrap_or(Act::Answer);
        if let Act::Refuse(reason) = act {
            let (_, load) = self.load(0);
            let refused = work::Refused {
                reason: reason.into(),
                load: Some(load),
                current: None,
            };
            let _ = send.send(&Frame::message(Kind::Refused, &refused)).await;
            send.finish();
            return;
        }
        let (seq, load) = self.load(1);
        let accepted = work::Accepted {
            report_seq: seq,
            load: Some(load),
        };
        let _ = send.send(&Frame::message(Kind::Accepted, &accepted)).await;
        let mut body = Vec::new();
        loop {
            match recv.recv().await {
                Ok(Some(frame)) if frame.kind == Kind::Body => {
                    body.extend_from_slice(&frame.payload);
                }
                Ok(Some(frame)) if frame.kind == Kind::BodyEnd => break,
                _ => {
                    self.load(-1);
                    self.tell(Saw::Cancelled);
                    return;
                }
            }
        }
        assert_eq!(body.len() as u64, place.body_bytes);
        self.tell(Saw::Body(body.len()));
        let streaming = body.windows(13).any(|part| part == b"\"stream\":true");
        let stopped = send.stopped();
        let acting = self.act(act, streaming, &mut send);
        let cancelled = async {
            // Behind the body is the end: who gives up stops reading, and resets what is not at its end.
            let end = recv.recv().await;
            assert!(matches!(end, Ok(None) | Err(_)), "{end:?}");
            stopped.await
        };
        let trailer = tokio::select! {
            trailer = acting => trailer,
            _ = cancelled => {
                self.load(-1);
                self.tell(Saw::Cancelled);
                return;
            }
        };
        let (seq, load) = self.load(-1);
        if let Some(end) = trailer {
            let counts = *self.counts.lock();
            let trailer = work::Trailer {
                end: end.into(),
                report_seq: seq,
                load: Some(load),
                prompt_tokens: counts.map(|(prompt, _)| prompt),
                cached_tokens: counts.and_then(|(_, cached)| cached),
                ..work::Trailer::default()
            };
            let _ = send.send(&Frame::message(Kind::Trailer, &trailer)).await;
            send.finish();
        }
    }

    /// Tells what is held, whenever that changes.
    async fn tell_residency(&self, send: &mut FrameSender) {
        let mut publisher = Publisher::new(self.incarnation, 1, Grade::Inferred);
        let mut holds = self.holds.clone();
        let mut cursor = None;
        loop {
            let held = holds.borrow_and_update().clone();
            let stored = |(chunk, tokens)| Change::Stored { chunk, tokens };
            publisher.note(held.into_iter().map(stored));
            publisher.flush();
            let frames: Vec<Frame> = match publisher.since(cursor) {
                Next::Nothing => Vec::new(),
                Next::Snapshot(pieces) => {
                    let last = pieces.last().unwrap();
                    cursor = Some(Cursor {
                        cache: last.cache,
                        seq: last.seq,
                    });
                    let kind = Kind::ResidencySnapshot;
                    pieces.iter().map(|p| Frame::message(kind, p)).collect()
                }
                Next::Deltas(deltas) => {
                    let cache = cursor.unwrap().cache;
                    let seq = deltas.last().unwrap().seq;
                    cursor = Some(Cursor { cache, seq });
                    let kind = Kind::ResidencyDelta;
                    deltas.iter().map(|d| Frame::message(kind, &**d)).collect()
                }
            };
            for frame in frames {
                if send.send(&frame).await.is_err() {
                    return;
                }
            }
            if holds.changed().await.is_err() {
                return;
            }
        }
    }

    /// Plays one act; without an end the stream breaks.
    async fn act(&self, act: Act, streaming: bool, send: &mut FrameSender) -> Option<work::End> {
        let (first, rest) = if streaming {
            (EVENT, REST)
        } else {
            WHOLE.split_at(10)
        };
        match act {
            Act::Refuse(_) => unreachable!("answered before"),
            Act::End(end) => return Some(end),
            Act::Break => return None,
            Act::Hang => std::future::pending().await,
            Act::Slow(wait) => tokio::time::sleep(wait).await,
            Act::Status(status, body) | Act::LateStatus(status, body) => {
                if matches!(act, Act::LateStatus(..)) {
                    tokio::time::sleep(Duration::from_millis(300)).await;
                }
                head(send, u32::from(status), "application/json").await;
                data(send, body).await;
                return Some(work::End::Complete);
            }
            Act::Answer
            | Act::BreakAfterFirst
            | Act::EndAfterFirst(_)
            | Act::GarbageAfterFirst
            | Act::HangAfterFirst
            | Act::Flood => {}
        }
        let kind = if streaming {
            "text/event-stream"
        } else {
            "application/json"
        };
        head(send, 200, kind).await;
        data(send, first).await;
        match act {
            Act::BreakAfterFirst => {
                // Reset frames overtake data: let them arrive.
                tokio::time::sleep(Duration::from_millis(50)).await;
                None
            }
            Act::EndAfterFirst(end) => Some(end),
            Act::GarbageAfterFirst => {
                let garbage = Frame::new(Kind::Trailer, Bytes::from_static(b"\xff\xff"));
                let _ = send.send(&garbage).await;
                std::future::pending().await
            }
            Act::HangAfterFirst => std::future::pending().await,
            Act::Flood => {
                let event = format!("data: {}\n\n", "x".repeat(60_000));
                loop {
                    if !data(send, &event).await {
                        std::future::pending::<()>().await;
                    }
                    self.flooded.fetch_add(60_000, Ordering::Relaxed);
                }
            }
            _ => {
                data(send, rest).await;
                Some(work::End::Complete)
            }
        }
    }
}

async fn head(send: &mut FrameSender, status: u32, kind: &str) {
    let head = work::Head {
        status,
        headers: vec![Label {
            key: "content-type".into(),
            value: kind.into(),
        }],
    };
    let _ = send.send(&Frame::message(Kind::Head, &head)).await;
}

async fn data(send: &mut FrameSender, text: &str) -> bool {
    let piece = Bytes::copy_from_slice(text.as_bytes());
    send.send(&Frame::new(Kind::Data, piece)).await.is_ok()
}

/// Starts an agent in a runtime of its own, so that it can be killed.
pub fn agent(credentials: &Credentials, name: &str, id: usize, slots: u32, next: &Script) -> Agent {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .unwrap();
    let inside_runtime = runtime.enter();
    let endpoint = Endpoint::bind(loopback(), credentials, &[Alpn::Work]).unwrap();
    let incarnation = Incarnation {
        worker: WorkerId(u32::try_from(id).unwrap()),
        grant: 1,
        start: 1,
    };
    endpoint.update_hello(|hello| hello.incarnation = Some(incarnation.to_wire()));
    let acts = Arc::new(Mutex::new(VecDeque::new()));
    let flooded = Arc::new(AtomicU64::new(0));
    let (tell, saw) = mpsc::unbounded_channel();
    let (hold, holds) = watch::channel(Vec::new());
    let (placed, counts) = (Arc::default(), Counts::default());
    let quotes = Arc::<Mutex<Option<u32>>>::default();
    let quoting = quotes.clone();
    let inside = Arc::new(Inside {
        placed: Arc::clone(&placed),
        counts: counts.clone(),
        holds,
        incarnation,
        slots,
        state: Mutex::default(),
        acts: acts.clone(),
        next: next.clone(),
        flooded: flooded.clone(),
        saw: tell,
    });
    let accepting = endpoint.clone();
    tokio::spawn(async move {
        while let Some(link) = accepting.accept().await {
            let (reporting, inside) = (link.clone(), inside.clone());
            let reporter = inside.clone();
            tokio::spawn(async move {
                while reporting.close_reason().is_none() {
                    let (_, load) = reporter.load(0);
                    reporting.send_datagram(&Frame::message(Kind::Load, &load));
                    tokio::time::sleep(Duration::from_millis(30)).await;
                }
            });
            let (asked, answering, quoting) = (link.clone(), inside.clone(), quoting.clone());
            tokio::spawn(async move {
                while let Ok(frame) = asked.read_datagram().await {
                    answering.tell(Saw::Asked);
                    let question = frame.decode::<work::Question>();
                    let cached = *quoting.lock();
                    let (Ok(question), Some(cached_tokens)) = (question, cached) else {
                        continue;
                    };
                    assert!(frame.payload.len() <= 1_100);
                    let quote = work::Quote {
                        id: question.id,
                        cached_tokens,
                        load: Some(answering.load(0).1),
                    };
                    asked.send_datagram(&Frame::message(Kind::Quote, &quote));
                }
            });
            tokio::spawn(async move {
                while let Ok((send, recv)) = link.accept().await {
                    tokio::spawn(inside.clone().serve(send, recv));
                }
            });
        }
    });
    let spec = WorkerSpec {
        pool: "default".into(),
        advertise: endpoint.local_addr().unwrap().to_string(),
        engine: "test".into(),
        models: vec!["m".into()],
        revision: String::new(),
        gpu_type: String::new(),
        gpu_count: 0,
        kv_tokens: 0,
        max_context_tokens: 0,
        adapters: Vec::new(),
        zone: String::new(),
        labels: BTreeMap::new(),
        slots,
    };
    drop(inside_runtime);
    Agent {
        endpoint: Some(endpoint),
        known: Known {
            name: name.into(),
            incarnation,
            spec,
            desired: Desired::Ready,
            departed: false,
        },
        acts,
        placed,
        counts,
        holds: hold,
        flooded,
        quotes,
        saw,
        runtime: Some(runtime),
    }
}
