//! Which role may call what. What is not in the table is denied.

use crate::identity::{Level, Role};
use crate::wire::control::request::Request;
use crate::wire::fleet::command::Action;

/// Everything that a peer can ask of another.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Rpc {
    /// State of one control node.
    Probe,
    /// Make an uninitialised node part of a new cluster.
    Bootstrap,
    /// A linearizable read of the facts.
    Read,
    /// Follow the facts.
    Watch,
    /// Keep a lease.
    Renew,
    /// Newest audit entries.
    Audit,
    /// Register a worker.
    RegisterWorker,
    /// Report a worker's observed state.
    ObserveWorker,
    /// A worker says goodbye.
    Goodbye,
    /// Set a worker's desired state.
    SetDesired,
    /// Remove a worker.
    RemoveWorker,
    /// Replace the configuration document.
    ApplyConfig,
    /// Declare leases expired.
    ExpireLeases,
    /// Raft messages.
    Raft,
    /// Replace the fingerprint key.
    RotateKey,
    /// Add, promote or remove nodes of the control plane.
    ChangeMembers,
    /// Let commands use newer features.
    RaiseFeatureLevel,
    /// Place a request on a worker.
    Place,
    /// Follow what is resident in a worker's cache.
    Follow,
    /// Make an uninitialised node, which was added before, a member.
    Join,
    /// Hand the leadership over.
    Transfer,
    /// The whole state, for a backup.
    Snapshot,
    /// Time an entry that changes nothing.
    Measure,
    /// Begin a drain, or call one off.
    Drain,
    /// A drain's deadline passed.
    PassDrainDeadline,
    /// Who holds a lease, and what they said with it.
    Holders,
    /// Hand over what a worker recorded, for a plan that is being made.
    Arrivals,
    /// Plan a rebalance.
    Plan,
    /// Begin a rebalance, or call one off.
    Rebalance,
    /// Give families their homes.
    AssignHomes,
    /// Make the next move of a rebalance, or stop it.
    StepRebalance,
    /// Say which requests an engine died under, or ran well.
    Suspect,
    /// Let quarantined requests through again.
    LiftQuarantine,
    /// Forget suspicions that are old.
    ForgetSuspects,
}

impl Rpc {
    /// Every RPC, for tables and tests.
    pub const ALL: [Self; 34] = [
        Self::Probe,
        Self::Bootstrap,
        Self::Read,
        Self::Watch,
        Self::Renew,
        Self::Audit,
        Self::RegisterWorker,
        Self::ObserveWorker,
        Self::Goodbye,
        Self::SetDesired,
        Self::RemoveWorker,
        Self::ApplyConfig,
        Self::ExpireLeases,
        Self::Raft,
        Self::RotateKey,
        Self::ChangeMembers,
        Self::RaiseFeatureLevel,
        Self::Place,
        Self::Follow,
        Self::Join,
        Self::Transfer,
        Self::Snapshot,
        Self::Measure,
        Self::Drain,
        Self::PassDrainDeadline,
        Self::Holders,
        Self::Arrivals,
        Self::Plan,
        Self::Rebalance,
        Self::AssignHomes,
        Self::StepRebalance,
        Self::Suspect,
        Self::LiftQuarantine,
        Self::ForgetSuspects,
    ];

    /// Whether a peer of this role may call it.
    ///
    /// That an agent speaks of its own worker only, and a node of itself, is checked beside this,
    /// where the name is known.
    #[must_use]
    pub const fn allows(self, role: Role) -> bool {
        use Role::{Agent, Balancer, Control, Operator};
        match self {
            Self::Probe => true,
            Self::Bootstrap
            | Self::ChangeMembers
            | Self::Join
            | Self::Transfer
            | Self::Snapshot
            | Self::RotateKey
            | Self::Measure => matches!(role, Operator(Level::Admin)),
            Self::Read | Self::Audit | Self::Holders | Self::Plan => {
                matches!(role, Control | Operator(_))
            }
            Self::Watch => matches!(role, Balancer | Agent | Control | Operator(_)),
            Self::Renew => matches!(role, Balancer | Agent),
            Self::RegisterWorker
            | Self::ObserveWorker
            | Self::Goodbye
            | Self::Arrivals
            | Self::Suspect => {
                matches!(role, Agent)
            }
            Self::SetDesired
            | Self::RemoveWorker
            | Self::ApplyConfig
            | Self::Drain
            | Self::Rebalance
            | Self::LiftQuarantine => {
                matches!(role, Operator(Level::Operator | Level::Admin))
            }
            // Only the leader's own controller proposes it, never a peer.
            Self::ExpireLeases
            | Self::RaiseFeatureLevel
            | Self::PassDrainDeadline
            | Self::AssignHomes
            | Self::StepRebalance
            | Self::ForgetSuspects => false,
            Self::Raft => matches!(role, Control),
            Self::Place | Self::Follow => matches!(role, Balancer),
        }
    }

    /// The RPC that a request to a control node is; `None` for an unknown or empty one.
    ///
    /// `action` is the decoded command of a `Propose`.
    #[must_use]
    pub fn of(request: &Request, action: Option<&Action>) -> Option<Self> {
        Some(match request {
            Request::Probe(_) => Self::Probe,
            Request::Bootstrap(_) => Self::Bootstrap,
            Request::Read(_) => Self::Read,
            Request::Watch(_) => Self::Watch,
            Request::Renew(_) => Self::Renew,
            Request::Audit(_) => Self::Audit,
            Request::Join(_) => Self::Join,
            Request::Transfer(_) => Self::Transfer,
            Request::Snapshot(_) => Self::Snapshot,
            Request::Measure(_) => Self::Measure,
            Request::Holders(_) => Self::Holders,
            Request::Arrivals(_) => Self::Arrivals,
            Request::Plan(_) => Self::Plan,
            Request::Propose(_) => match action? {
                Action::Register(_) => Self::RegisterWorker,
                Action::Observe(_) => Self::ObserveWorker,
                Action::Goodbye(_) => Self::Goodbye,
                Action::SetDesired(_) | Action::SetDesiredOf(_) => Self::SetDesired,
                Action::StartDrain(_) | Action::CancelDrain(_) => Self::Drain,
                Action::PassDrainDeadline(_) => Self::PassDrainDeadline,
                Action::Remove(_) => Self::RemoveWorker,
                Action::ApplyConfig(_) => Self::ApplyConfig,
                Action::Expire(_) => Self::ExpireLeases,
                Action::RotateKey(_) => Self::RotateKey,
                Action::ChangeMembers(_) => Self::ChangeMembers,
                Action::RaiseFeatureLevel(_) => Self::RaiseFeatureLevel,
                Action::AssignHomes(_) => Self::AssignHomes,
                Action::StartRebalance(_) | Action::CancelRebalance(_) => Self::Rebalance,
                Action::StepRebalance(_) | Action::StopRebalance(_) => Self::StepRebalance,
                Action::AccuseRequests(_) | Action::ClearRequests(_) => Self::Suspect,
                Action::LiftQuarantine(_) => Self::LiftQuarantine,
                Action::ForgetSuspects(_) => Self::ForgetSuspects,
            },
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The table as reviewed, one row an RPC: control, balancer, agent, viewer, operator, admin.
    const REVIEWED: [(Rpc, &str); 34] = [
        (Rpc::Probe, "cbavoA"),
        (Rpc::Bootstrap, ".....A"),
        (Rpc::Read, "c..voA"),
        (Rpc::Watch, "cbavoA"),
        (Rpc::Renew, ".ba..."),
        (Rpc::Audit, "c..voA"),
        (Rpc::RegisterWorker, "..a..."),
        (Rpc::ObserveWorker, "..a..."),
        (Rpc::Goodbye, "..a..."),
        (Rpc::SetDesired, "....oA"),
        (Rpc::RemoveWorker, "....oA"),
        (Rpc::ApplyConfig, "....oA"),
        (Rpc::ExpireLeases, "......"),
        (Rpc::Raft, "c....."),
        (Rpc::RotateKey, ".....A"),
        (Rpc::ChangeMembers, ".....A"),
        (Rpc::RaiseFeatureLevel, "......"),
        (Rpc::Place, ".b...."),
        (Rpc::Follow, ".b...."),
        (Rpc::Join, ".....A"),
        (Rpc::Transfer, ".....A"),
        (Rpc::Snapshot, ".....A"),
        (Rpc::Measure, ".....A"),
        (Rpc::Drain, "....oA"),
        (Rpc::PassDrainDeadline, "......"),
        (Rpc::Holders, "c..voA"),
        (Rpc::Arrivals, "..a..."),
        (Rpc::Plan, "c..voA"),
        (Rpc::Rebalance, "....oA"),
        (Rpc::AssignHomes, "......"),
        (Rpc::StepRebalance, "......"),
        (Rpc::Suspect, "..a..."),
        (Rpc::LiftQuarantine, "....oA"),
        (Rpc::ForgetSuspects, "......"),
    ];

    #[test]
    fn every_rpc_allows_the_roles_that_were_reviewed_and_no_other() {
        for rpc in Rpc::ALL {
            let rows: Vec<_> = REVIEWED.iter().filter(|(row, _)| *row == rpc).collect();
            let [(_, row)] = rows[..] else {
                panic!("{rpc:?} needs exactly one row")
            };
            let allowed: String = Role::ALL
                .into_iter()
                .zip("cbavoA".chars())
                .map(|(role, letter)| if rpc.allows(role) { letter } else { '.' })
                .collect();
            assert_eq!(&allowed, row, "{rpc:?}");
        }
    }

    #[test]
    fn the_list_of_rpcs_is_complete() {
        // A variant beyond the list would have a discriminant of its length or more.
        for (position, rpc) in Rpc::ALL.into_iter().enumerate() {
            assert_eq!(rpc as usize, position);
        }
        assert_eq!(
            Rpc::ALL.last().map(|rpc| *rpc as usize),
            Some(Rpc::ForgetSuspects as usize)
        );
    }

    #[test]
    fn a_proposal_without_a_known_command_is_no_rpc() {
        assert_eq!(Rpc::of(&Request::Propose(Default::default()), None), None);
    }
}
