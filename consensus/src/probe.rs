//! Rare branches, marked so that a simulation can prove that it was there.
//!
//! A test that never reaches a branch says nothing of it. [`hit`] costs an "or" on a thread's own word,
//! so the marks stay in every build; FoundationDB calls them code probes.

use std::cell::Cell;

/// A rare branch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Probe {
    /// A leader left a joint membership that another leader had entered.
    JointLeftByAnotherLeader,
    /// A leader applied its own removal, which a leader before it had begun.
    LeaderRemoved,
    /// An unfinished write was cut off at the end of the log.
    TornTail,
    /// A snapshot of the leader was on disk, and the log was not emptied at it yet.
    SnapshotBeforeReset,
    /// A damaged snapshot was passed over for the one before it.
    SnapshotPassedOver,
    /// A log or snapshot was refused as damaged.
    Damage,
    /// A segment of the log was followed by a new one.
    SegmentRolled,
    /// A write found the disk full.
    DiskFull,
    /// A leader's snapshot replaced the state.
    SnapshotInstalled,
    /// A snapshot was made.
    SnapshotMade,
    /// A proposal's outcome became unknown by a change of leadership.
    ProposalLost,
    /// A read was asked again because nothing came.
    ReadAskedAgain,
    /// A repeated command got its first outcome.
    Repeated,
    /// A command older than the newest one of its client came.
    StaleSequence,
    /// A command needed a feature level that not everyone has.
    FeatureTooNew,
    /// A worker with a newer incarnation was there already.
    Superseded,
    /// A guard kept a model from being left without a worker.
    LeavesModelEmpty,
    /// A change of the members was committed and refused when it was applied.
    ChangeRefused,
    /// A peer's message was refused.
    MessageRejected,
    /// A watcher that was too far behind got a snapshot.
    WatcherCut,
    /// Entries that were never committed were replaced by a new leader's.
    EntriesReplaced,
    /// A leader handed over on request.
    Transferred,
    /// A guard kept a model from being left with too few slots.
    CapacityShort,
}

impl Probe {
    /// All of them.
    pub const ALL: [Self; 23] = [
        Self::JointLeftByAnotherLeader,
        Self::LeaderRemoved,
        Self::TornTail,
        Self::SnapshotBeforeReset,
        Self::SnapshotPassedOver,
        Self::Damage,
        Self::SegmentRolled,
        Self::DiskFull,
        Self::SnapshotInstalled,
        Self::SnapshotMade,
        Self::ProposalLost,
        Self::ReadAskedAgain,
        Self::Repeated,
        Self::StaleSequence,
        Self::FeatureTooNew,
        Self::Superseded,
        Self::LeavesModelEmpty,
        Self::ChangeRefused,
        Self::MessageRejected,
        Self::WatcherCut,
        Self::EntriesReplaced,
        Self::Transferred,
        Self::CapacityShort,
    ];
}

thread_local! {
    static HIT: Cell<u64> = const { Cell::new(0) };
}

/// This branch was taken on this thread.
pub fn hit(probe: Probe) {
    HIT.with(|hit| hit.set(hit.get() | 1 << probe as u8));
}

/// The branches that were taken on this thread since the last call.
#[must_use]
pub fn take() -> Vec<Probe> {
    let hit = HIT.with(|hit| hit.replace(0));
    Probe::ALL
        .into_iter()
        .filter(|probe| hit & 1 << *probe as u8 != 0)
        .collect()
}
