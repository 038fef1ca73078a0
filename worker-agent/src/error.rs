//! Why an agent cannot serve, or stops.

use std::io;
use std::path::PathBuf;

use forebay_admin::ServeError;
use forebay_control_client::ClientError;
use forebay_link::{BindError, CredentialsError};
use forebay_proto::refusal::Refusal;
use forebay_proto::{ClusterId, Incarnation};

use crate::rim::engine::EngineAddressError;

/// Why the agent did not start, or stopped serving. Each variant is another thing to do.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// An option makes no sense.
    #[error("{option}: {problem}")]
    Option {
        /// Which, as on the command line.
        option: &'static str,
        /// What is wrong and what to do.
        problem: String,
    },
    /// The engine's address is none.
    #[error("--engine-url: {0}")]
    Engine(#[from] EngineAddressError),
    /// The certificate, the key or the CA cannot be used.
    #[error(transparent)]
    Credentials(#[from] CredentialsError),
    /// The certificate is not this agent's.
    #[error(
        "the certificate {cert} names {found}, this process is {expected}: issue one with `forebay ca issue`, or give the one of {expected}",
        cert = .cert.display()
    )]
    Identity {
        /// The certificate.
        cert: PathBuf,
        /// Whom it names.
        found: String,
        /// Who it must name.
        expected: String,
    },
    /// The address for balancers cannot be listened on.
    #[error(transparent)]
    Bind(#[from] BindError),
    /// The admin address cannot be listened on.
    #[error(transparent)]
    Admin(#[from] ServeError),
    /// Another process uses the data directory.
    #[error(
        "{directory} is in use by another process: stop it, or give this one a directory of its own by --data-dir",
        directory = .directory.display()
    )]
    DirectoryTaken {
        /// Which.
        directory: PathBuf,
    },
    /// The data directory cannot be read or written.
    #[error("{path}: {error}", path = .path.display())]
    Disk {
        /// Which file or directory.
        path: PathBuf,
        /// What the system says.
        error: io::Error,
    },
    /// The agent's record is damaged or of a later version.
    #[error(
        "{path}: {problem}. If this worker's other copies of it are lost, move the file away: the worker is then registered anew, once its lease has run out",
        path = .path.display()
    )]
    Record {
        /// Which file.
        path: PathBuf,
        /// What is wrong.
        problem: String,
    },
    /// The data directory is of another worker.
    #[error(
        "{directory} belongs to worker {held}, this process is {name}: give each worker a directory of its own by --data-dir",
        directory = .directory.display()
    )]
    OtherWorker {
        /// Which.
        directory: PathBuf,
        /// Whose it is.
        held: String,
        /// Who we are.
        name: String,
    },
    /// The data directory is of another cluster.
    #[error(
        "{directory} belongs to cluster {held}, but {address} is of cluster {found}: check --control; to join {found} give this process an empty data directory",
        directory = .directory.display()
    )]
    OtherCluster {
        /// Which.
        directory: PathBuf,
        /// Whose it is.
        held: ClusterId,
        /// The node that says otherwise.
        address: String,
        /// Its cluster.
        found: ClusterId,
    },
    /// The addresses given are not of one control plane.
    #[error(
        "{first} is of cluster {a}, {second} of cluster {b}: --control must name nodes of one cluster"
    )]
    MixedControl {
        /// A node.
        first: String,
        /// Its cluster.
        a: ClusterId,
        /// Another node.
        second: String,
        /// Its cluster.
        b: ClusterId,
    },
    /// A newer process took this one's place.
    #[error(
        "a newer start of {name} is registered{current}: this process ({own}) has stopped serving. Only one process may run as {name}: find the other one before this is started again",
        current = .current.map_or_else(String::new, |current| format!(": {current}"))
    )]
    Superseded {
        /// The worker.
        name: String,
        /// Who we were.
        own: Incarnation,
        /// Who holds the place.
        current: Option<Incarnation>,
    },
    /// An operator removed the worker.
    #[error(
        "worker {name} was removed: this process has stopped serving. To join anew, start it with an empty data directory"
    )]
    Removed {
        /// The worker.
        name: String,
    },
    /// The control plane does not take this worker.
    #[error("worker {name} is not registered: {refusal}")]
    Refused {
        /// The worker.
        name: String,
        /// Why.
        refusal: Refusal,
    },
    /// The control plane does not take this process's calls.
    #[error("worker {name} is not registered: {error}")]
    Control {
        /// The worker.
        name: String,
        /// Why.
        error: ClientError,
    },
}
