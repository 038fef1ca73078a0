//! Copies of live requests that warm homes: sent beside the request, never in its way, and given up with it.
#![allow(clippy::disallowed_methods)] // the rim: this is where time passes

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use forebay_link::{FrameReceiver, Link};
use forebay_proto::frame::{Frame, Kind};
use forebay_proto::wire::work;
use forebay_proto::{Incarnation, WorkerId};
use tokio::sync::Notify;
use tokio::time::timeout;

use crate::attempt::send_request;
use crate::core::shadows::{self, Home};
use crate::exchange::Exchange;
use crate::links::Task;
use crate::shared::{BodyBudget, Placement, Shared};

/// A copy that has not ended by then is given up.
const PATIENCE: Duration = Duration::from_secs(30);

/// How a copy ended, for metrics.
pub(crate) const COMPLETE: &str = "complete";
pub(crate) const REFUSED: &str = "refused";
pub(crate) const FAILED: &str = "failed";
pub(crate) const CANCELLED: &str = "cancelled";

impl Exchange {
    /// Begins a copy of this request on a home that is to hold its family and does not, if one is due. It ends with
    /// what is returned.
    pub(crate) fn warm(&self, placement: &Placement) -> Option<Task> {
        // What may kill one engine is not sent to two.
        if self.verdict().suspected {
            return None;
        }
        let facts = self.shared.facts()?;
        let (table, path) = (facts.homes(), &self.prompt.chunks);
        if table.is_empty() || !table.all_of(path).any(|family| family.pinned) {
            return None;
        }
        let mut hits = Vec::new();
        self.shared.index.hits(path, &mut hits);
        let (now, placed) = (self.shared.now(), placement.choice.incarnation.worker);
        let due = self
            .shared
            .shadows
            .lock()
            .due(now, table, path, &hits, placed);
        // From here on it ends by its drop.
        let mut copying = Copying {
            shared: self.shared.clone(),
            home: due?,
            outcome: CANCELLED,
        };
        let Some((copy, incarnation, link)) = self.copy(copying.home) else {
            copying.outcome = FAILED;
            return None;
        };
        let place = self.shadow_frame(placement, incarnation, copy.text.len());
        Some(Task::spawn(async move {
            let mut copying = copying;
            let sent = timeout(PATIENCE, send(&copying.shared, &link, place, copy)).await;
            copying.outcome = sent.unwrap_or(FAILED);
        }))
    }

    /// The copy's body, and the link to the home; none: there is no memory for it, no link, or no such body.
    fn copy(&self, home: Home) -> Option<(Copy, Incarnation, Link)> {
        let (incarnation, link) = self.shared.dispatch().link_to(home.worker)?;
        let mut held = self.shared.hold_body();
        let room = self.body.text.len() as u64 + 64;
        if !held.take(room) {
            return None;
        }
        let text = shadows::body(self.body.text.expose()).ok()?;
        let copy = Copy {
            text: text.into(),
            home: home.worker,
            _held: held,
        };
        Some((copy, incarnation, link))
    }

    fn shadow_frame(&self, placement: &Placement, to: Incarnation, bytes: usize) -> Frame {
        let place = work::Place {
            request_id: format!("{}-shadow", self.request_id),
            incarnation: Some(to.to_wire()),
            body_bytes: bytes as u64,
            stream: false,
            max_tokens: 1,
            // Nobody waits for it, and it is behind everything that somebody waits for.
            must_queue: true,
            expected_wait_ms: None,
            expected_ttft_ms: None,
            expected_cached_tokens: 0,
            ttft_target_ms: None,
            tpot_target_ms: None,
            deadline_ms: u32::try_from(PATIENCE.as_millis()).unwrap_or(u32::MAX),
            shadow: true,
            chunks: self.chunks_for(to.worker),
            ..self.header(placement, 0, true)
        };
        Frame::message(Kind::Place, &place)
    }
}

struct Copy {
    text: Bytes,
    home: WorkerId,
    _held: BodyBudget,
}

/// A copy under way: dropped, it is over.
struct Copying {
    shared: Arc<Shared>,
    home: Home,
    outcome: &'static str,
}

impl Drop for Copying {
    fn drop(&mut self) {
        let done = self.outcome == COMPLETE;
        let now = self.shared.now();
        self.shared.shadows.lock().over(now, self.home, done);
        self.shared.metrics.shadow(self.outcome);
    }
}

async fn send(shared: &Arc<Shared>, link: &Link, place: Frame, copy: Copy) -> &'static str {
    let Ok((mut sender, mut receiver)) = link.open() else {
        return FAILED;
    };
    let accepted = Notify::new();
    let sending = send_request(&mut sender, place, copy.text.clone(), &accepted);
    let hearing = hear(shared, copy.home, &mut receiver, &accepted);
    tokio::pin!(sending, hearing);
    tokio::select! {
        biased;
        ended = &mut hearing => ended,
        _ = &mut sending => hearing.await,
    }
}

/// What became of it. Of the answer nothing is kept.
async fn hear(
    shared: &Arc<Shared>,
    worker: WorkerId,
    receiver: &mut FrameReceiver,
    accepted: &Notify,
) -> &'static str {
    let hear = |load: Option<work::LoadReport>| {
        if let Some(load) = load {
            shared.hear(&load, worker);
        }
    };
    while let Ok(Some(frame)) = receiver.recv().await {
        match frame.kind {
            Kind::Accepted => {
                let Ok(taken) = frame.decode::<work::Accepted>() else {
                    return FAILED;
                };
                hear(taken.load);
                accepted.notify_one();
            }
            Kind::Refused => return REFUSED,
            Kind::Trailer => {
                let Ok(trailer) = frame.decode::<work::Trailer>() else {
                    return FAILED;
                };
                let end = trailer.end();
                hear(trailer.load);
                return if end == work::End::Complete {
                    COMPLETE
                } else {
                    FAILED
                };
            }
            Kind::Head => match frame.decode::<work::Head>() {
                Ok(head) if head.status == 200 => {}
                Ok(_) | Err(_) => return FAILED,
            },
            // The answer.
            Kind::Data => {}
            _ => return FAILED,
        }
    }
    FAILED
}
