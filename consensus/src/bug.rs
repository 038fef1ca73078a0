//! Known bugs of systems like this one, put back on purpose: a simulation that does not catch them says
//! nothing by finding no others.
//!
//! Only the feature `bugs`, which tests switch on, compiles them in; in every other build [`on`] is
//! `false` where it stands. One bug at a time is on, on the thread that [`put_back`] it.

/// A bug.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bug {
    /// A batch counts as written before it is synced.
    AckBeforeSync,
    /// A sync that failed is passed over.
    FailedSyncPassedOver,
    /// The vote is not written.
    VoteNotPersisted,
    /// Term and vote are written only when entries are.
    HardStateWithEntriesOnly,
    /// A snapshot's name is given before its bytes are synced.
    SnapshotNotSynced,
    /// The folder is not synced after a file got its name.
    FolderNotSynced,
    /// The checksum of a record is not looked at.
    ChecksumIgnored,
    /// Entries that a new leader replaced come back at a restart.
    ReplacedEntriesComeBack,
    /// A restart takes the whole log for committed.
    WholeLogTakenForCommitted,
    /// Any node answers reads from what it has.
    StaleRead,
    /// A leader answers reads without asking whether it still leads.
    LeaderReadsAlone,
    /// A change of the members takes effect when it is proposed.
    ChangeWhenProposed,
    /// What waits for an entry takes whatever was applied at its index.
    OutcomeOfAnother,
    /// A snapshot has no sessions: what was applied before it is applied again.
    SnapshotWithoutSessions,
    /// A snapshot forgets what operators want of workers.
    SnapshotLosesDesired,
    /// A snapshot of the replica has the members of the one before.
    SnapshotOfOlderMembers,
    /// A repeated command is applied again.
    RetryAppliedTwice,
    /// An older start of a worker takes the place of a newer one.
    StaleIncarnation,
    /// A compare-and-set does not compare.
    ConfigOverwritten,
    /// A node of the version before stores a spec as it understands it.
    ReencodedByOldNode,
    /// Commands that not everyone understands are proposed.
    FeatureNotGated,
    /// A node judges a configuration by what itself understands.
    ConfigByOwnRules,
    /// A leader goes on with the leases of when it led before.
    OldLeases,
    /// A leader judges before it has applied what was agreed before it.
    ReignTooEarly,
    /// Each leader begins the cell's time anew.
    CellTimeRestarts,
    /// A watcher that is too far behind gets the deltas that are left.
    DeltasSkipped,
    /// A snapshot forgets the drains.
    SnapshotLosesDrains,
    /// A drain takes the last worker.
    CapacityGuardOff,
    /// What an agent said before it knew of a drain counts for it.
    DrainedByAnOldWord,
    /// A snapshot forgets the rebalances.
    SnapshotLosesRebalances,
    /// A snapshot forgets which requests killed engines.
    SnapshotLosesSuspects,
    /// Homes stay on workers that take nothing any more.
    HomesStay,
    /// A rebalance takes the place of one that goes on.
    RebalanceTakesOver,
}

impl Bug {
    /// All of them.
    pub const ALL: [Self; 33] = [
        Self::AckBeforeSync,
        Self::FailedSyncPassedOver,
        Self::VoteNotPersisted,
        Self::HardStateWithEntriesOnly,
        Self::SnapshotNotSynced,
        Self::FolderNotSynced,
        Self::ChecksumIgnored,
        Self::ReplacedEntriesComeBack,
        Self::WholeLogTakenForCommitted,
        Self::StaleRead,
        Self::LeaderReadsAlone,
        Self::ChangeWhenProposed,
        Self::OutcomeOfAnother,
        Self::SnapshotWithoutSessions,
        Self::SnapshotLosesDesired,
        Self::SnapshotOfOlderMembers,
        Self::RetryAppliedTwice,
        Self::StaleIncarnation,
        Self::ConfigOverwritten,
        Self::ReencodedByOldNode,
        Self::FeatureNotGated,
        Self::ConfigByOwnRules,
        Self::OldLeases,
        Self::ReignTooEarly,
        Self::CellTimeRestarts,
        Self::DeltasSkipped,
        Self::SnapshotLosesDrains,
        Self::CapacityGuardOff,
        Self::DrainedByAnOldWord,
        Self::SnapshotLosesRebalances,
        Self::SnapshotLosesSuspects,
        Self::HomesStay,
        Self::RebalanceTakesOver,
    ];

    /// Its name on a command line: `ack-before-sync`.
    #[must_use]
    pub fn name(self) -> String {
        let mut name = String::new();
        for letter in format!("{self:?}").chars() {
            if letter.is_uppercase() && !name.is_empty() {
                name.push('-');
            }
            name.push(letter.to_ascii_lowercase());
        }
        name
    }

    /// The bug of this name.
    #[must_use]
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|bug| bug.name() == name)
    }
}

#[cfg(feature = "bugs")]
mod switch {
    use std::cell::Cell;

    use super::Bug;

    thread_local! {
        static ON: Cell<Option<Bug>> = const { Cell::new(None) };
    }

    /// Puts a bug back on this thread, or takes it out again; says whether this build can.
    pub fn put_back(bug: Option<Bug>) -> bool {
        ON.with(|on| on.set(bug));
        true
    }

    pub(crate) fn on(bug: Bug) -> bool {
        ON.with(Cell::get) == Some(bug)
    }
}

#[cfg(not(feature = "bugs"))]
mod switch {
    use super::Bug;

    /// Puts a bug back on this thread, or takes it out again; says whether this build can.
    #[must_use]
    pub const fn put_back(bug: Option<Bug>) -> bool {
        bug.is_none()
    }

    pub(crate) const fn on(_: Bug) -> bool {
        false
    }
}

pub(crate) use switch::on;
pub use switch::put_back;
