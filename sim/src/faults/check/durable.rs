//! Nothing leaves a node before what it asserts would survive a loss of power at that instant (I5), and
//! what a node promised is there when it starts again, or it refuses to start.

use std::collections::BTreeMap;

use forebay_consensus::node::{Message, MessageType, Restored};
use forebay_proto::NodeId;

use super::super::host::holds;
use super::{Held, Violation};

const NAME: &str = "durable-before-said";

/// What a node said last of what it remembers.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Promised {
    pub(crate) term: u64,
    /// In which term it voted for whom.
    vote: Option<(u64, u64)>,
    /// Index and term of the newest entry that it acknowledged.
    entry: Option<(u64, u64)>,
}

#[derive(Default)]
pub(crate) struct Durable {
    promised: BTreeMap<NodeId, Promised>,
}

impl Durable {
    /// What these messages promise; `None` when they promise nothing. `term_at` is the node's own log.
    pub(crate) fn said(
        &mut self,
        node: NodeId,
        messages: &[(NodeId, Message)],
        term_at: impl Fn(u64) -> Option<u64>,
    ) -> Option<Promised> {
        let promised = self.promised.entry(node).or_default();
        let mut said = false;
        for (to, message) in messages {
            let kind = message.get_msg_type();
            let (append, vote) = (
                kind == MessageType::MsgAppendResponse && !message.reject,
                kind == MessageType::MsgRequestVoteResponse && !message.reject,
            );
            if !append && !vote {
                continue;
            }
            said = true;
            promised.term = promised.term.max(message.term);
            if vote {
                promised.vote = Some((message.term, to.0));
            }
            if append && let Some(term) = term_at(message.index) {
                promised.entry = Some((message.index, term));
            }
        }
        said.then_some(*promised)
    }

    /// Whether the node acknowledged this index, or a later one.
    pub(crate) fn said_to_hold(&self, node: NodeId, index: u64) -> bool {
        let promised = self.promised.get(&node);
        let entry = promised.and_then(|promised| promised.entry);
        entry.is_some_and(|(newest, _)| newest >= index)
    }

    /// What was promised must be in what a disk gives back.
    pub(crate) fn check(node: NodeId, promised: Promised, restored: &Restored) -> Held {
        let state = restored.hard_state;
        let broken = |what: String| Err(Violation::new(NAME, format!("{node} {what}: {state:?}")));
        if state.term < promised.term {
            return broken(format!("spoke in term {}", promised.term));
        }
        if let Some((term, to)) = promised.vote
            && state.term == term
            && state.vote != to
        {
            return broken(format!("voted for {to} in term {term}"));
        }
        if let Some((index, term)) = promised.entry {
            let last = restored.entries.last().map_or(0, |last| last.term);
            // A later leader may have replaced it since.
            if !holds(restored, index, term) && last <= term {
                return broken(format!("acknowledged {index}@{term}"));
            }
        }
        Ok(())
    }

    /// A process began with this memory.
    pub(crate) fn started(&self, node: NodeId, restored: &Restored) -> Held {
        let promised = self.promised.get(&node).copied().unwrap_or_default();
        Self::check(node, promised, restored)
    }
}
