//! What a verb's end means to a script: one exit code for each choice that it has.

use std::path::PathBuf;

use forebay_control_client::{AddError, ClientError, InitError};
use forebay_proto::refusal::Refusal;

/// The exit codes, a contract.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Exit {
    /// It did not work, for a reason that no other code names.
    Failed = 1,
    /// The command line or a file given by it is wrong.
    Usage = 2,
    /// No answer in time; what was asked for may still happen.
    TimedOut = 3,
    /// The fleet refuses it as it stands.
    Refused = 4,
    /// What was named does not exist.
    NotFound = 5,
    /// The certificate may not do that.
    Unauthorized = 6,
    /// The control plane cannot be reached or has no quorum.
    Unreachable = 7,
    /// Somebody else changed it meanwhile.
    Conflict = 8,
    /// Done in part.
    Partial = 9,
}

impl Exit {
    /// The number for the shell.
    pub(crate) const fn code(self) -> u8 {
        self as u8
    }
}

/// Why a verb did not do what it was asked for.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CliError {
    /// A problem with its own code and sentence.
    #[error("{message}")]
    Because {
        /// What scripts see.
        exit: Exit,
        /// What people see: what is wrong and what to do.
        message: String,
    },
    /// The command line or a context is wrong.
    #[error(transparent)]
    Context(#[from] crate::context::ContextError),
    /// A role's config file is wrong.
    #[error(transparent)]
    Settings(#[from] crate::settings::SettingsError),
    /// `dev` cannot go on.
    #[error(transparent)]
    Dev(#[from] crate::dev::DevError),
    /// The control plane did not do it.
    #[error(transparent)]
    Control(#[from] ClientError),
    /// No cluster was founded.
    #[error(transparent)]
    Init(#[from] InitError),
    /// A control node was not added.
    #[error(transparent)]
    Add(#[from] AddError),
    /// A backup.
    #[error(transparent)]
    Backup(#[from] forebay_consensus::backup::BackupError),
    /// The certificate authority.
    #[error(transparent)]
    Pki(#[from] forebay_link::PkiError),
    /// Our own certificate.
    #[error(transparent)]
    Credentials(#[from] forebay_link::CredentialsError),
    /// The emulated engine.
    #[error(transparent)]
    Engine(#[from] forebay_sim::engine::EngineError),
    /// A trace.
    #[error(transparent)]
    Trace(#[from] forebay_sim::trace::TraceError),
    /// A replay.
    #[error(transparent)]
    Replay(#[from] forebay_sim::replay::ReplayError),
    /// A configuration document.
    #[error(transparent)]
    Document(#[from] forebay_proto::config::ConfigError),
    /// Logging.
    #[error(transparent)]
    Logs(#[from] forebay_admin::logs::LogError),
    /// The admin pages.
    #[error(transparent)]
    Admin(#[from] forebay_admin::ServeError),
    /// The control node.
    #[error(transparent)]
    Server(#[from] forebay_consensus::server::ServerError),
    /// The balancer.
    #[error(transparent)]
    Balancer(#[from] forebay_balancer::BalancerError),
    /// The agent.
    #[error(transparent)]
    Agent(#[from] forebay_worker_agent::AgentError),
    /// Core dumps stay on.
    #[error(transparent)]
    Hygiene(#[from] forebay_admin::HygieneError),
    /// A file.
    #[error("{path}: {error}")]
    File {
        /// Which.
        path: PathBuf,
        /// What the system says.
        error: std::io::Error,
    },
    /// The system refuses what a process needs to run.
    #[error("{what}: {error}")]
    System {
        /// What was tried.
        what: &'static str,
        /// What the system says.
        error: std::io::Error,
    },
}

impl CliError {
    /// A problem with the command line.
    pub(crate) fn usage(message: impl Into<String>) -> Self {
        Self::because(Exit::Usage, message)
    }

    /// A problem with its own code.
    pub(crate) fn because(exit: Exit, message: impl Into<String>) -> Self {
        Self::Because {
            exit,
            message: message.into(),
        }
    }

    /// What scripts see.
    pub(crate) fn exit(&self) -> Exit {
        use forebay_link::PkiError;
        use forebay_sim::engine::EngineError;
        match self {
            Self::Because { exit, .. } => *exit,
            Self::Context(_)
            | Self::Settings(_)
            | Self::Document(_)
            | Self::Logs(_)
            | Self::Credentials(_)
            | Self::Engine(EngineError::Setting { .. })
            | Self::Pki(PkiError::Name(_) | PkiError::Days(_)) => Exit::Usage,
            Self::Pki(PkiError::Exists(_)) => Exit::Conflict,
            Self::Dev(error) => error.exit(),
            Self::Server(error) => of_server(error),
            Self::Agent(error) => of_agent(error),
            Self::Balancer(error) => of_balancer(error),
            Self::Control(error) => of_client(error),
            Self::Init(error) => of_init(error),
            Self::Add(error) => of_add(error),
            Self::Backup(error) => of_backup(error),
            Self::Replay(error) => of_replay(error),
            Self::Pki(_)
            | Self::Engine(_)
            | Self::Trace(_)
            | Self::Admin(_)
            | Self::Hygiene(_)
            | Self::File { .. }
            | Self::System { .. } => Exit::Failed,
        }
    }
}

fn of_client(error: &ClientError) -> Exit {
    match error {
        ClientError::NoQuorum { .. } | ClientError::Uninitialised { .. } => Exit::Unreachable,
        ClientError::DeadlineExceeded { .. } => Exit::TimedOut,
        ClientError::Unauthorized { .. } => Exit::Unauthorized,
        ClientError::Refused(refusal) => of_refusal(refusal),
        ClientError::Superseded { .. } => Exit::Conflict,
        ClientError::BadRequest { .. } | ClientError::Unintelligible { .. } => Exit::Failed,
    }
}

fn of_refusal(refusal: &Refusal) -> Exit {
    match refusal {
        Refusal::UnknownWorker { .. }
        | Refusal::UnknownPool { .. }
        | Refusal::UnknownDrain { .. }
        | Refusal::UnknownRebalance { .. }
        | Refusal::UnknownSuspect { .. } => Exit::NotFound,
        Refusal::RevisionConflict { .. }
        | Refusal::Superseded { .. }
        | Refusal::StillLive { .. }
        | Refusal::StaleSequence { .. }
        | Refusal::DrainActive { .. }
        | Refusal::RebalanceActive { .. }
        | Refusal::PlanStale { .. }
        | Refusal::FeatureTooNew { .. } => Exit::Conflict,
        Refusal::LeavesModelEmpty { .. }
        | Refusal::CapacityShort { .. }
        | Refusal::CapacityUnknown { .. }
        | Refusal::PoolInUse { .. }
        | Refusal::Full { .. }
        | Refusal::MembersUnfit { .. } => Exit::Refused,
        Refusal::Invalid { .. } => Exit::Usage,
        Refusal::StaleEvidence { .. } => Exit::Failed,
    }
}

fn of_init(error: &InitError) -> Exit {
    match error {
        InitError::Size { .. } | InitError::Address(_) | InitError::Twice { .. } => Exit::Usage,
        InitError::Unreachable { .. } => Exit::Unreachable,
        InitError::Initialised { .. } => Exit::Conflict,
        InitError::Unfit { .. } => Exit::Refused,
        InitError::Unfinished { .. } => Exit::Partial,
    }
}

fn of_add(error: &AddError) -> Exit {
    match error {
        AddError::Address(_) => Exit::Usage,
        AddError::Unreachable { .. } => Exit::Unreachable,
        AddError::OtherCluster { .. } | AddError::OtherAddress { .. } => Exit::Conflict,
        AddError::Unfit { .. } | AddError::WasRemoved { .. } | AddError::LostDisk { .. } => {
            Exit::Refused
        }
        AddError::Client(error) => of_client(error),
        AddError::Unfinished { .. } => Exit::Partial,
    }
}

fn of_backup(error: &forebay_consensus::backup::BackupError) -> Exit {
    use forebay_consensus::backup::BackupError;
    use forebay_consensus::store::StoreError;
    match error {
        BackupError::Member(_) => Exit::Usage,
        BackupError::NotEmpty { .. } | BackupError::Store(StoreError::InUse { .. }) => {
            Exit::Conflict
        }
        BackupError::Damaged(_)
        | BackupError::State(_)
        | BackupError::Store(_)
        | BackupError::Members(_) => Exit::Failed,
    }
}

fn of_server(error: &forebay_consensus::server::ServerError) -> Exit {
    use forebay_consensus::server::ServerError;
    use forebay_consensus::store::StoreError;
    match error {
        ServerError::Credentials(_) => Exit::Usage,
        ServerError::WrongRole { .. } => Exit::Unauthorized,
        ServerError::OtherNode { .. } | ServerError::Store(StoreError::InUse { .. }) => {
            Exit::Conflict
        }
        ServerError::Bind(_)
        | ServerError::Store(_)
        | ServerError::Start(_)
        | ServerError::Stopped(_) => Exit::Failed,
    }
}

fn of_balancer(error: &forebay_balancer::BalancerError) -> Exit {
    use forebay_balancer::BalancerError;
    match error {
        BalancerError::Keys(_)
        | BalancerError::NoKeys
        | BalancerError::Tls(_)
        | BalancerError::Credentials(_) => Exit::Usage,
        BalancerError::WrongRole(_) => Exit::Unauthorized,
        BalancerError::Taken(_)
        | BalancerError::Listen { .. }
        | BalancerError::Admin(_)
        | BalancerError::Bind(_)
        | BalancerError::DataDir { .. } => Exit::Failed,
    }
}

fn of_agent(error: &forebay_worker_agent::AgentError) -> Exit {
    use forebay_worker_agent::AgentError;
    match error {
        AgentError::Option { .. } | AgentError::Engine(_) | AgentError::Credentials(_) => {
            Exit::Usage
        }
        AgentError::Identity { .. } => Exit::Unauthorized,
        AgentError::Refused { refusal, .. } => of_refusal(refusal),
        AgentError::Control { error, .. } => of_client(error),
        AgentError::Superseded { .. }
        | AgentError::OtherWorker { .. }
        | AgentError::OtherCluster { .. }
        | AgentError::MixedControl { .. }
        | AgentError::DirectoryTaken { .. } => Exit::Conflict,
        AgentError::Removed { .. } => Exit::NotFound,
        AgentError::Bind(_)
        | AgentError::Admin(_)
        | AgentError::Disk { .. }
        | AgentError::Record { .. } => Exit::Failed,
    }
}

fn of_replay(error: &forebay_sim::replay::ReplayError) -> Exit {
    use forebay_sim::replay::ReplayError;
    match error {
        ReplayError::Model { .. } => Exit::Unreachable,
        ReplayError::NoTarget
        | ReplayError::Target(_)
        | ReplayError::Tls(_)
        | ReplayError::Speed(_)
        | ReplayError::NoneInFlight
        | ReplayError::NoRequests
        | ReplayError::ApiKey => Exit::Usage,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_choice_of_a_script_has_its_code() {
        let check = |error: CliError, code: u8| assert_eq!(error.exit().code(), code, "{error}");
        let refused = |refusal: Refusal| CliError::Control(ClientError::Refused(refusal));
        check(CliError::usage("x"), 2);
        check(
            refused(Refusal::RevisionConflict {
                expected: 1,
                current: 2,
            }),
            8,
        );
        check(
            refused(Refusal::PoolInUse {
                pool: "p".into(),
                workers: 1,
            }),
            4,
        );
        check(refused(Refusal::UnknownWorker { name: "w".into() }), 5);
        check(refused(Refusal::invalid("pools", "is empty")), 2);
        check(
            CliError::Control(ClientError::Unauthorized {
                rpc: "x".into(),
                identity: "y".into(),
            }),
            6,
        );
        check(
            CliError::Control(ClientError::NoQuorum {
                tried: Default::default(),
            }),
            7,
        );
        check(
            CliError::Control(ClientError::DeadlineExceeded {
                tried: Default::default(),
            }),
            3,
        );
    }
}
