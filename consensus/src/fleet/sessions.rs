//! Exactly once: the newest command of each client and what became of it.
//!
//! A client sends one command at a time, so one outcome a client is enough. At the bound the client
//! that was silent for longest is forgotten; only a retry that arrives after thousands of other
//! clients have spoken could then be applied twice.

use std::collections::BTreeMap;

use forebay_proto::ClientId;
use forebay_proto::wire::fleet as wire;

use crate::bug::{Bug, on};

/// Clients remembered.
pub(super) const MAX_SESSIONS: usize = 4_096;

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Sessions(BTreeMap<ClientId, Session>);

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Session {
    /// Newest sequence number applied.
    pub(super) sequence: u64,
    /// Log index at which the client last spoke.
    pub(super) used: u64,
    pub(super) outcome: wire::Outcome,
}

/// Whether a command was applied before.
pub(super) enum Seen {
    Never,
    /// It is the newest one, and this came of it.
    Before(wire::Outcome),
    /// A later one of the same client was applied.
    Past {
        newest: u64,
    },
}

impl Sessions {
    pub(super) fn find(&mut self, client: ClientId, sequence: u64, index: u64) -> Seen {
        let Some(session) = self.0.get_mut(&client) else {
            return Seen::Never;
        };
        session.used = session.used.max(index);
        match sequence.cmp(&session.sequence) {
            std::cmp::Ordering::Greater => Seen::Never,
            std::cmp::Ordering::Equal if on(Bug::RetryAppliedTwice) => Seen::Never,
            std::cmp::Ordering::Equal => Seen::Before(session.outcome.clone()),
            std::cmp::Ordering::Less => Seen::Past {
                newest: session.sequence,
            },
        }
    }

    pub(super) fn record(
        &mut self,
        client: ClientId,
        sequence: u64,
        index: u64,
        outcome: wire::Outcome,
    ) {
        let session = Session {
            sequence,
            used: index,
            outcome,
        };
        self.0.insert(client, session);
        if self.0.len() > MAX_SESSIONS {
            let oldest = self
                .0
                .iter()
                .min_by_key(|(client, session)| (session.used, **client))
                .map(|(client, _)| *client);
            if let Some(oldest) = oldest {
                self.0.remove(&oldest);
            }
        }
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (&ClientId, &Session)> {
        self.0.iter()
    }

    pub(super) fn restore(sessions: impl IntoIterator<Item = (ClientId, Session)>) -> Self {
        Self(sessions.into_iter().collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn client(number: u64) -> ClientId {
        let mut id = [0; 16];
        id[..8].copy_from_slice(&number.to_be_bytes());
        ClientId(id)
    }

    #[test]
    fn at_the_bound_the_client_that_was_silent_for_longest_is_forgotten() {
        let mut sessions = Sessions::default();
        let bound = MAX_SESSIONS as u64;
        for number in 0..bound {
            sessions.record(client(number), 1, number, wire::Outcome::default());
        }
        assert!(matches!(
            sessions.find(client(0), 1, bound),
            Seen::Before(_)
        ));
        sessions.record(client(bound), 1, bound + 1, wire::Outcome::default());
        assert_eq!(sessions.0.len(), MAX_SESSIONS);
        assert!(matches!(
            sessions.find(client(0), 1, bound),
            Seen::Before(_)
        ));
        assert!(matches!(sessions.find(client(1), 1, bound), Seen::Never));
    }
}
