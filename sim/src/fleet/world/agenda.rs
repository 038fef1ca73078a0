//! What happens next.

use forebay_proto::Now;
use forebay_scheduler::{BookingId, Load};
use forebay_worker_agent::core::Offer;

use super::super::balancer::{Answer, News};
use super::super::worker::Why;

pub(super) enum Event {
    Arrive(u32),
    /// An offer reaches a worker.
    Offer(u32, BookingId, Box<Offer>),
    /// An agent's word reaches a balancer.
    Taken(u32, BookingId, u64, Box<Load>),
    Refused(u32, BookingId, Option<Box<Load>>),
    Over(u32, BookingId, Why, u64, Box<Load>),
    Lost(u32, BookingId),
    /// A question reaches a worker.
    Asked(u32, u32, u32),
    /// An answer reaches a balancer.
    Answered(u32, u32, Answer, Box<Load>),
    /// The balancer waits for no more answers.
    Decide(u32, u32),
    Report(u16, Box<(Load, News)>),
    ReportDue(u16, u32),
    Wake(u32),
    Fault(usize),
    Mended(usize),
    /// The leader looks at what is hot.
    Homes,
}

pub(super) struct Due(pub(super) Now, pub(super) u64, pub(super) Event);

impl PartialEq for Due {
    fn eq(&self, other: &Self) -> bool {
        (self.0, self.1) == (other.0, other.1)
    }
}
impl Eq for Due {}
impl PartialOrd for Due {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}
impl Ord for Due {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        (self.0, self.1).cmp(&(other.0, other.1))
    }
}
