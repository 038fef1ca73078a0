//! The audit: each mutation, done or refused, as one link of a hash chain.
//!
//! The state keeps the head, the count and the newest entries. Whoever holds entries and a head can
//! [`verify`] that nothing was changed, inserted, reordered or cut off at the end.

use std::collections::VecDeque;

use forebay_proto::Revision;
use forebay_proto::suspect::suspect_name;
use forebay_proto::wire::fleet as wire;
use sha2::{Digest, Sha256};
use wire::command::Action;

use super::proposal::Proposal;

/// Entries kept in the state.
pub const KEPT_ENTRIES: usize = 1_000;

/// The hash before the first entry.
pub const GENESIS: [u8; 32] = [0; 32];

/// Texts from outside are cut to this many bytes.
const MAX_TEXT_BYTES: usize = 512;

/// The chain as the state holds it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Chain {
    head: [u8; 32],
    count: u64,
    tail: VecDeque<wire::AuditEntry>,
}

impl Default for Chain {
    fn default() -> Self {
        Self {
            head: GENESIS,
            count: 0,
            tail: VecDeque::new(),
        }
    }
}

/// What a command is about, for its audit entry.
pub(super) struct Subject {
    action: &'static str,
    target: String,
}

impl Subject {
    /// `None` for what is not audited: the routine reports of agents, those of suspects that ran well included,
    /// and homes that follow their heat.
    pub(super) fn of(action: Option<&Action>) -> Option<Self> {
        let (action, target) = match action {
            None => ("unknown", String::new()),
            Some(Action::Observe(_) | Action::AssignHomes(_) | Action::ClearRequests(_)) => {
                return None;
            }
            Some(Action::Register(command)) => ("register", command.name.clone()),
            Some(Action::Goodbye(command)) => ("goodbye", printed(command.incarnation.as_ref())),
            Some(Action::SetDesired(command)) => ("set-desired", desired(command)),
            Some(Action::SetDesiredOf(command)) => (
                match command.desired() {
                    wire::Desired::Ready => "uncordon",
                    wire::Desired::Cordoned => "cordon",
                    wire::Desired::Unspecified | wire::Desired::Draining => "set-desired",
                },
                workers(
                    &command.names,
                    command.ignore_capacity_guard,
                    command.dry_run,
                ),
            ),
            Some(Action::StartDrain(command)) => (
                "drain",
                workers(
                    &command.names,
                    command.ignore_capacity_guard,
                    command.dry_run,
                ),
            ),
            Some(Action::CancelDrain(command)) => (
                "cancel-drain",
                format!("d{}{}", command.id, remarks(false, command.dry_run)),
            ),
            Some(Action::PassDrainDeadline(command)) => {
                ("drain-deadline", format!("d{}", command.id))
            }
            Some(Action::StartRebalance(command)) => (
                "rebalance",
                format!(
                    "{}, {} moves{}",
                    cut(&command.pool),
                    command.moves.len(),
                    remarks(false, command.dry_run)
                ),
            ),
            Some(Action::StepRebalance(command)) => (
                "rebalance-step",
                format!("r{} move {}", command.id, u64::from(command.step) + 1),
            ),
            Some(Action::StopRebalance(command)) => (
                "rebalance-stop",
                format!("r{}: {}", command.id, cut(&command.why)),
            ),
            Some(Action::CancelRebalance(command)) => (
                "cancel-rebalance",
                format!("r{}{}", command.id, remarks(false, command.dry_run)),
            ),
            Some(Action::AccuseRequests(command)) => (
                "engine-died",
                format!(
                    "{}, {} requests on it: {}",
                    printed(command.incarnation.as_ref()),
                    command.in_flight,
                    suspects(command.accused.iter().map(|accused| accused.key))
                ),
            ),
            Some(Action::LiftQuarantine(command)) => (
                "lift-quarantine",
                format!(
                    "{}{}",
                    match &command.keys[..] {
                        [] => "all".into(),
                        keys => suspects(keys.iter().copied()),
                    },
                    remarks(false, command.dry_run)
                ),
            ),
            Some(Action::ForgetSuspects(_)) => ("forget-suspects", String::new()),
            Some(Action::Remove(command)) => ("remove", command.name.clone()),
            Some(Action::ApplyConfig(_)) => ("apply-config", "config".into()),
            Some(Action::Expire(command)) => ("expire-leases", expired(command)),
            Some(Action::ChangeMembers(command)) => ("change-members", changed(command)),
            Some(Action::RaiseFeatureLevel(command)) => {
                ("raise-feature-level", format!("to {}", command.to))
            }
            // Never the key itself.
            Some(Action::RotateKey(command)) => (
                "rotate-key",
                format!("after epoch {}", command.expected_epoch),
            ),
        };
        Some(Self { action, target })
    }
}

/// Names of the first of these requests, and how many more there are.
fn suspects(keys: impl ExactSizeIterator<Item = u64>) -> String {
    let all = keys.len();
    let mut names: Vec<String> = keys.take(8).map(suspect_name).collect();
    if all > names.len() {
        names.push(format!("{} more", all - names.len()));
    }
    names.join(", ")
}

/// The first of the workers' names, how many more there are, and how it was asked.
fn workers(names: &[String], guard_ignored: bool, dry_run: bool) -> String {
    let shown: Vec<&str> = names.iter().take(8).map(|name| cut(name)).collect();
    let more = match names.len() - shown.len() {
        0 => String::new(),
        more => format!(", {more} more"),
    };
    format!(
        "{}{more}{}",
        shown.join(", "),
        remarks(guard_ignored, dry_run)
    )
}

fn remarks(guard_ignored: bool, dry_run: bool) -> String {
    let guard = if guard_ignored {
        " (guard overridden)"
    } else {
        ""
    };
    let dry = if dry_run { " (dry run)" } else { "" };
    format!("{guard}{dry}")
}

fn desired(command: &wire::SetDesired) -> String {
    let state = match command.desired() {
        wire::Desired::Unspecified => "unspecified",
        wire::Desired::Ready => "ready",
        wire::Desired::Cordoned => "cordoned",
        wire::Desired::Draining => "draining",
    };
    let guard = if command.override_guard {
        " (guard overridden)"
    } else {
        ""
    };
    format!("{} {state}{guard}", cut(&command.name))
}

fn changed(command: &wire::ChangeMembers) -> String {
    let added = command
        .add
        .iter()
        .map(|member| format!("+{}", cut(&member.name)));
    let promoted = command.promote.iter().map(|id| format!("^{id}"));
    let removed = command.remove.iter().map(|id| format!("-{id}"));
    let parts: Vec<String> = added.chain(promoted).chain(removed).take(16).collect();
    parts.join(" ")
}

fn expired(command: &wire::ExpireLeases) -> String {
    let mut parts: Vec<String> = command
        .evidence
        .iter()
        .take(8)
        .map(|evidence| printed(evidence.incarnation.as_ref()))
        .collect();
    if command.evidence.len() > parts.len() {
        parts.push(format!("{} more", command.evidence.len() - parts.len()));
    }
    parts.extend(
        command
            .correlated
            .iter()
            .take(8)
            .map(|pool| format!("not believed in {}", cut(pool))),
    );
    parts.join(", ")
}

fn printed(incarnation: Option<&forebay_proto::wire::Incarnation>) -> String {
    incarnation.map_or_else(
        || "none".into(),
        |i| format!("w{}.{}.{}", i.worker, i.grant, i.start),
    )
}

/// The text up to the bound, whole characters only.
fn cut(text: &str) -> &str {
    let mut end = text.len().min(MAX_TEXT_BYTES);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    &text[..end]
}

impl Chain {
    pub(super) fn append(
        &mut self,
        at: Revision,
        proposal: &Proposal,
        subject: &Subject,
        result: &str,
    ) {
        let mut entry = wire::AuditEntry {
            index: at.0,
            at_ms: proposal.at.0,
            actor: Some(wire::Actor {
                identity: cut(&proposal.actor.identity).into(),
                address: cut(&proposal.actor.address).into(),
            }),
            action: subject.action.into(),
            target: cut(&subject.target).into(),
            reason: cut(&proposal.reason).into(),
            result: result.into(),
            previous_hash: self.head.to_vec().into(),
            hash: bytes::Bytes::new(),
        };
        self.head = hash(&entry);
        entry.hash = self.head.to_vec().into();
        self.count += 1;
        self.tail.push_back(entry);
        if self.tail.len() > KEPT_ENTRIES {
            self.tail.pop_front();
        }
    }

    pub(super) const fn head(&self) -> [u8; 32] {
        self.head
    }

    pub(super) const fn count(&self) -> u64 {
        self.count
    }

    pub(super) fn tail(&self, limit: usize) -> Vec<wire::AuditEntry> {
        let skipped = self.tail.len().saturating_sub(limit);
        self.tail.iter().skip(skipped).cloned().collect()
    }

    /// The chain with this tail, if it verifies.
    pub(super) fn restore(
        head: [u8; 32],
        count: u64,
        tail: Vec<wire::AuditEntry>,
    ) -> Result<Self, Broken> {
        verify(&tail, &head)?;
        Ok(Self {
            head,
            count,
            tail: tail.into(),
        })
    }
}

/// Where a chain does not hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Broken {
    /// The entry's content does not give its hash.
    #[error("audit entry {index} was changed after it was made")]
    Changed {
        /// Its log index.
        index: u64,
    },
    /// The entry does not follow the one before it.
    #[error("audit entry {index} does not follow the entry before it: one is missing or moved")]
    Unlinked {
        /// Its log index.
        index: u64,
    },
    /// The last entry is not the head.
    #[error("the audit's last entries are missing: they do not lead to its head")]
    Truncated,
}

/// Checks that the entries, oldest first, are one unbroken part of the chain that ends in `head`.
///
/// # Errors
///
/// Returns the first place that does not hold.
pub fn verify(entries: &[wire::AuditEntry], head: &[u8]) -> Result<(), Broken> {
    let mut previous: Option<&[u8]> = None;
    for entry in entries {
        let index = entry.index;
        if previous.is_some_and(|previous| previous != &entry.previous_hash[..]) {
            return Err(Broken::Unlinked { index });
        }
        if hash(entry) != entry.hash[..] {
            return Err(Broken::Changed { index });
        }
        previous = Some(&entry.hash);
    }
    if previous.unwrap_or(&GENESIS) == head {
        Ok(())
    } else {
        Err(Broken::Truncated)
    }
}

/// SHA-256 over the previous hash and the entry's fields, each with its length in front.
pub(super) fn hash(entry: &wire::AuditEntry) -> [u8; 32] {
    let none = wire::Actor::default();
    let actor = entry.actor.as_ref().unwrap_or(&none);
    let mut hash = Sha256::new();
    hash.update(b"forebay audit 1");
    for field in [
        &entry.previous_hash[..],
        &entry.index.to_be_bytes(),
        &entry.at_ms.to_be_bytes(),
        actor.identity.as_bytes(),
        actor.address.as_bytes(),
        entry.action.as_bytes(),
        entry.target.as_bytes(),
        entry.reason.as_bytes(),
        entry.result.as_bytes(),
    ] {
        hash.update((field.len() as u64).to_be_bytes());
        hash.update(field);
    }
    hash.finalize().into()
}

#[cfg(test)]
mod tests {
    use forebay_proto::{ClientId, Millis};

    use super::*;

    fn chain(entries: u64) -> Chain {
        let mut chain = Chain::default();
        for i in 0..entries {
            let proposal = Proposal {
                at: Millis(i),
                actor: wire::Actor {
                    identity: "operator/admin/a".into(),
                    address: "h:1".into(),
                },
                client: ClientId([0; 16]),
                sequence: i,
                command: bytes::Bytes::new(),
                reason: "because".into(),
                evidence: None,
            };
            let subject = Subject {
                action: "remove",
                target: format!("w{i}"),
            };
            chain.append(Revision(i + 1), &proposal, &subject, "done");
        }
        chain
    }

    fn broken(change: impl FnOnce(&mut Vec<wire::AuditEntry>)) -> Broken {
        let chain = chain(10);
        let mut entries = chain.tail(5);
        change(&mut entries);
        verify(&entries, &chain.head()).unwrap_err()
    }

    #[test]
    fn a_tail_of_the_chain_verifies_against_its_head() {
        let chain = chain(10);
        for limit in [1, 5, 10, 100] {
            assert_eq!(verify(&chain.tail(limit), &chain.head()), Ok(()));
        }
        assert_eq!(verify(&[], &GENESIS), Ok(()));
    }

    #[test]
    fn the_first_place_that_was_touched_is_named() {
        assert_eq!(
            broken(|e| e[2].reason.push('!')),
            Broken::Changed { index: 8 }
        );
        assert_eq!(broken(|e| drop(e.remove(2))), Broken::Unlinked { index: 9 });
        assert_eq!(broken(|e| e.swap(2, 3)), Broken::Unlinked { index: 9 });
        assert_eq!(
            broken(|e| e.insert(2, e[0].clone())),
            Broken::Unlinked { index: 6 }
        );
        assert_eq!(broken(|e| drop(e.pop())), Broken::Truncated);
        assert_eq!(broken(Vec::clear), Broken::Truncated);
    }

    #[test]
    fn the_state_keeps_the_newest_entries_only() {
        let chain = chain(KEPT_ENTRIES as u64 + 7);
        assert_eq!(chain.tail(usize::MAX).len(), KEPT_ENTRIES);
        assert_eq!(chain.count(), KEPT_ENTRIES as u64 + 7);
        assert_eq!(verify(&chain.tail(usize::MAX), &chain.head()), Ok(()));
    }

    #[test]
    fn long_texts_are_cut_at_whole_characters() {
        assert_eq!(cut(&"ü".repeat(400)).len(), 512);
        assert_eq!(cut(&format!("x{}", "ü".repeat(400))).len(), 511);
    }
}
