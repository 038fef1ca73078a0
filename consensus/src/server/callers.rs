//! What one caller may hold at once: links, streams, and requests on their way in.
//!
//! A caller is an identity, however many links it makes, so what a certificate can take from a node
//! is bounded: [`MAX_RECEIVING`] requests that are not whole yet, [`MAX_STREAMS`] streams with a task
//! each, [`MAX_LINKS`] links, of which the oldest gives way to a new one. It is the oldest because a
//! process that was killed leaves its links behind until they are silent for long enough, and the one
//! that takes its place must not wait for that.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use forebay_link::{Code, Link};
use parking_lot::Mutex;
use tokio::sync::Semaphore;

/// Links of one identity.
pub(crate) const MAX_LINKS: usize = 32;
/// Streams of one identity, watches included; more are answered as overloaded.
pub(crate) const MAX_STREAMS: usize = 256;
/// Requests of one identity that are being received; more wait their turn. Each may be as large as a
/// request frame.
const MAX_RECEIVING: usize = 8;

/// Everyone with a link to this node; as many as there are certificates in use.
#[derive(Default)]
pub(crate) struct Callers(Arc<Mutex<BTreeMap<String, Held>>>);

#[derive(Default)]
struct Held {
    links: VecDeque<(u64, Link)>,
    next: u64,
    bounds: Arc<Bounds>,
}

/// The bounds that all links of one identity share.
pub(crate) struct Bounds {
    pub(crate) streams: Arc<Semaphore>,
    pub(crate) receiving: Semaphore,
}

impl Default for Bounds {
    fn default() -> Self {
        Self {
            streams: Arc::new(Semaphore::new(MAX_STREAMS)),
            receiving: Semaphore::new(MAX_RECEIVING),
        }
    }
}

/// One link of a caller; given back when it is dropped.
pub(crate) struct Caller {
    callers: Arc<Mutex<BTreeMap<String, Held>>>,
    who: String,
    number: u64,
    pub(crate) bounds: Arc<Bounds>,
}

impl Callers {
    /// Counts a link to its caller. At the bound the caller's oldest link is closed.
    pub(crate) fn admit(&self, link: &Link) -> Caller {
        let who = link.peer().short();
        let mut callers = self.0.lock();
        let held = callers.entry(who.clone()).or_default();
        let number = held.next;
        held.next += 1;
        held.links.push_back((number, link.clone()));
        let oldest = (held.links.len() > MAX_LINKS).then(|| held.links.pop_front());
        if let Some((_, oldest)) = oldest.flatten() {
            tracing::warn!(who, MAX_LINKS, "too many links: its oldest one is closed");
            oldest.close(Code::Normal, "too many links of this identity: the oldest");
        }
        Caller {
            bounds: held.bounds.clone(),
            callers: self.0.clone(),
            who,
            number,
        }
    }
}

impl Drop for Caller {
    fn drop(&mut self) {
        let mut callers = self.callers.lock();
        if let Some(held) = callers.get_mut(&self.who) {
            held.links.retain(|(number, _)| *number != self.number);
            if held.links.is_empty() {
                callers.remove(&self.who);
            }
        }
    }
}
