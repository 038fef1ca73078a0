//! A leader judges only when it has applied all that was agreed before its term (I7).

use forebay_proto::NodeId;

use super::{Held, Violation};

#[derive(Default)]
pub(crate) struct ReignBegins;

impl ReignBegins {
    pub(crate) fn check(&self, node: NodeId, term: u64, applied: u64, agreed_before: u64) -> Held {
        if applied >= agreed_before {
            return Ok(());
        }
        let detail = format!(
            "{node} began to judge in term {term} at index {applied}, and {agreed_before} was agreed before"
        );
        Err(Violation::new("a-reign-begins-up-to-date", detail))
    }
}
