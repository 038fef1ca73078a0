//! The process: what it is configured with, how it starts, and why it may not.

use std::net::SocketAddr;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use forebay_link::{BindError, CredentialPaths, Credentials, CredentialsError, Endpoint};
use forebay_proto::{Identity, Role};
use tokio::net::TcpListener;
use tokio::sync::watch;

use crate::admin;
use crate::control;
use crate::core::auth::{Keys, KeysError};
use crate::fleet::Fleet;
use crate::links::Links;
use crate::shared::Shared;
use crate::tls::{Tls, TlsError, TlsPaths};

/// What bounds a client, whatever it does. The defaults are those of the manual.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Connections; those beyond are told so and closed.
    pub connections: usize,
    /// From the connection to the end of the TLS handshake, and from there to enough bytes to know
    /// the protocol.
    pub first_bytes: Duration,
    /// From the first byte of a request's head to its last, over HTTP/1.
    pub header: Duration,
    /// Longest wait for the next byte of a body.
    pub body_pause: Duration,
    /// How long a client may take no byte.
    pub stall: Duration,
    /// A connection without a request ends after this long, at the latest after twice as long: later
    /// than proxies and clients give up theirs, whose next request would meet its end.
    pub idle: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connections: 16_384,
            first_bytes: Duration::from_secs(10),
            header: Duration::from_secs(10),
            body_pause: Duration::from_secs(10),
            stall: Duration::from_secs(30),
            idle: Duration::from_secs(75),
        }
    }
}

/// How clients are treated.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settings {
    /// Where clients connect.
    pub listen: SocketAddr,
    /// Where the admin pages are; none: nowhere.
    pub admin: Option<SocketAddr>,
    /// The file with hashed keys.
    pub keys: Option<PathBuf>,
    /// For development: the tenant of any key, and of none.
    pub any_key_tenant: Option<String>,
    /// Certificate and key for clients; none: they speak plain HTTP.
    pub tls: Option<TlsPaths>,
    /// Largest body in bytes.
    pub max_body_bytes: u64,
    /// How long a stream's status line waits for the engine's first byte.
    pub hold_headers_ms: u64,
    /// How long requests may take to finish once the process is told to stop.
    pub drain_timeout_ms: u64,
    /// Receipts of decisions that are kept and shown; 0: decisions are not explained.
    pub receipts: usize,
    /// For how long after a rotation what is cached under the fingerprint key before is still found.
    pub key_overlap: Duration,
    /// What bounds a client.
    pub limits: Limits,
}

/// Long enough for most conversations to end before they have to move to the newest key, which costs
/// each that goes on one prefill; short enough for a key that was replaced to be of no use the same day.
const KEY_OVERLAP: Duration = Duration::from_secs(3_600);

impl Settings {
    /// The defaults, with nobody allowed to ask yet: set `keys` or `any_key_tenant`.
    #[must_use]
    pub fn on(listen: SocketAddr) -> Self {
        Self {
            listen,
            admin: None,
            keys: None,
            any_key_tenant: None,
            tls: None,
            max_body_bytes: 32 << 20,
            hold_headers_ms: 15_000,
            drain_timeout_ms: 30_000,
            receipts: 0,
            key_overlap: KEY_OVERLAP,
            limits: Limits::default(),
        }
    }
}

/// One balancer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// Where clients connect.
    pub listen: SocketAddr,
    /// Where the admin pages are; none: nowhere.
    pub admin: Option<SocketAddr>,
    /// Control nodes (`host:port`); any one that is up suffices.
    pub control: Vec<String>,
    /// Where the last facts are kept.
    pub data_dir: PathBuf,
    /// Our certificate, key and CA.
    pub credentials: CredentialPaths,
    /// The file with hashed keys.
    pub keys: Option<PathBuf>,
    /// For development: the tenant of any key, and of none.
    pub any_key_tenant: Option<String>,
    /// Certificate and key for clients; none: they speak plain HTTP.
    pub tls: Option<TlsPaths>,
    /// Largest body in bytes.
    pub max_body_bytes: u64,
    /// How long a stream's status line waits for the engine's first byte.
    pub hold_headers_ms: u64,
    /// How long requests may take to finish once the process is told to stop.
    pub drain_timeout_ms: u64,
    /// Receipts of decisions that are kept and shown; 0: decisions are not explained.
    pub receipts: usize,
}

impl Config {
    fn settings(&self) -> Settings {
        Settings {
            listen: self.listen,
            admin: self.admin,
            keys: self.keys.clone(),
            any_key_tenant: self.any_key_tenant.clone(),
            tls: self.tls.clone(),
            max_body_bytes: self.max_body_bytes,
            hold_headers_ms: self.hold_headers_ms,
            drain_timeout_ms: self.drain_timeout_ms,
            receipts: self.receipts,
            key_overlap: KEY_OVERLAP,
            limits: Limits::default(),
        }
    }
}

/// Addresses that are bound.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bound {
    /// Where clients connect.
    pub listen: SocketAddr,
    /// Where the admin pages are.
    pub admin: Option<SocketAddr>,
}

/// Why a balancer did not start.
#[derive(Debug, thiserror::Error)]
pub enum BalancerError {
    /// Somebody else has the port.
    #[error("{0} is taken by another process: stop it, or give another address by --listen")]
    Taken(SocketAddr),
    /// The system refused the address.
    #[error("cannot listen on {address}: {error}; give another address by --listen")]
    Listen {
        /// The address.
        address: SocketAddr,
        /// What the system says.
        error: std::io::Error,
    },
    /// The admin pages cannot be served.
    #[error(transparent)]
    Admin(#[from] forebay_admin::ServeError),
    /// The keys file cannot be used.
    #[error(transparent)]
    Keys(#[from] KeysError),
    /// The certificate or key for clients cannot be used.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// Nobody could ask.
    #[error("nobody may ask: give --keys FILE, or --any-key-tenant NAME for development")]
    NoKeys,
    /// The certificate, key or CA cannot be used.
    #[error(transparent)]
    Credentials(#[from] CredentialsError),
    /// No socket towards the workers.
    #[error(transparent)]
    Bind(#[from] BindError),
    /// The data directory cannot be made.
    #[error("cannot use the data directory {path}: {error}; give another one by --data-dir")]
    DataDir {
        /// The directory.
        path: PathBuf,
        /// What the system says.
        error: std::io::Error,
    },
    /// The certificate is somebody else's.
    #[error(
        "the certificate names {}, not a balancer: issue one with `forebay ca issue --role balancer --name NAME`",
        .0.short()
    )]
    WrongRole(Identity),
}

/// Runs a balancer until `shutdown`, then drains it.
///
/// Follows the facts by the control plane, and begins with those in the data directory, so that it
/// serves again while the control plane is gone.
///
/// # Errors
///
/// Returns why it did not start, with what to do.
pub async fn run(config: Config, shutdown: impl Future<Output = ()>) -> Result<(), BalancerError> {
    let credentials = Credentials::load(&config.credentials)?;
    let identity = credentials.identity();
    if identity.role != Role::Balancer {
        return Err(BalancerError::WrongRole(identity.clone()));
    }
    make_private(&config.data_dir).map_err(|error| BalancerError::DataDir {
        path: config.data_dir.clone(),
        error,
    })?;
    let endpoint = Endpoint::client(&credentials)?;
    let following = control::follow(&endpoint, &config.control, &config.data_dir);
    let bound = |bound: Bound| {
        let admin = bound.admin.map(|admin| admin.to_string());
        tracing::info!(listen = %bound.listen, admin, "serving");
    };
    let facts = following.facts();
    let served = until_drained(config.settings(), &endpoint, facts, bound, shutdown).await;
    drop(following);
    say_goodbye(&endpoint).await;
    served
}

async fn say_goodbye(endpoint: &Endpoint) {
    endpoint.close("the balancer stops");
    endpoint.wait_idle().await;
}

fn make_private(directory: &Path) -> std::io::Result<()> {
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(directory)
}

/// Who may ask, by the settings.
pub(crate) fn read_keys(settings: &Settings) -> Result<Keys, BalancerError> {
    let anyone = settings.any_key_tenant.as_deref();
    let Some(path) = &settings.keys else {
        return anyone.map(Keys::anyone).ok_or(BalancerError::NoKeys);
    };
    let text = std::fs::read_to_string(path).map_err(|error| KeysError::Read {
        path: path.clone(),
        error,
    })?;
    let keys = Keys::parse(path, &text)?;
    Ok(match anyone {
        Some(tenant) => keys.or_anyone(tenant),
        None => keys,
    })
}

/// Serves clients by the facts that `facts` brings until `shutdown`, then drains.
///
/// `bound` is told the addresses once both ports are open.
///
/// # Errors
///
/// Returns why it did not start, with what to do.
pub async fn serve(
    settings: Settings,
    endpoint: Endpoint,
    facts: watch::Receiver<Option<Arc<Fleet>>>,
    bound: impl FnOnce(Bound),
    shutdown: impl Future<Output = ()>,
) -> Result<(), BalancerError> {
    let served = until_drained(settings, &endpoint, facts, bound, shutdown).await;
    say_goodbye(&endpoint).await;
    served
}

async fn until_drained(
    settings: Settings,
    endpoint: &Endpoint,
    facts: watch::Receiver<Option<Arc<Fleet>>>,
    bound: impl FnOnce(Bound),
    shutdown: impl Future<Output = ()>,
) -> Result<(), BalancerError> {
    let identity = endpoint.identity().clone();
    if identity.role != Role::Balancer {
        return Err(BalancerError::WrongRole(identity));
    }
    let keys = read_keys(&settings)?;
    let tls = settings.tls.as_ref().map(Tls::load).transpose()?;
    let listener = listen(settings.listen).await?;
    let listen = listener
        .local_addr()
        .map_err(|error| BalancerError::Listen {
            address: settings.listen,
            error,
        })?;
    let admin_at = settings.admin;
    let shared = Shared::new(settings, keys, tls);
    let admin = match admin_at {
        Some(address) => {
            let pages = admin::admin(&shared, &identity.name);
            Some(forebay_admin::serve(address, pages).await?)
        }
        None => None,
    };
    bound(Bound { listen, admin });
    let links = Links::new(shared.clone(), endpoint.clone());
    crate::serve::serve(shared, links, facts, listener, shutdown).await;
    Ok(())
}

async fn listen(address: SocketAddr) -> Result<TcpListener, BalancerError> {
    crate::serve::listen(address)
        .await
        .map_err(|error| match error.kind() {
            std::io::ErrorKind::AddrInUse => BalancerError::Taken(address),
            _ => BalancerError::Listen { address, error },
        })
}
