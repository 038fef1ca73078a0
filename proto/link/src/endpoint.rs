//! Binding, dialling, accepting: where a [`Link`] comes from.

use std::io;
use std::net::{SocketAddr, UdpSocket};
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use forebay_proto::frame::{Frame, Kind};
use forebay_proto::wire::Hello;
use forebay_proto::{Identity, Role};
use parking_lot::Mutex;
use quinn::crypto::rustls::{HandshakeData, QuicClientConfig, QuicServerConfig};
use ring::{digest, hmac};
use rustls::crypto::CryptoProvider;
use rustls_pki_types::CertificateDer;
use tokio::sync::{Semaphore, mpsc};

use crate::credentials::{Credentials, CredentialsError, peer_identity};
use crate::link::{Alpn, Link, LinkClosed, printable};
use crate::stream::{FrameReceiver, FrameSender};
use crate::verify::{ClientVerifier, ServerVerifier};
use crate::{Code, PROTOCOL};

/// Streams that a peer may have open at once.
const MAX_STREAMS: u32 = 1_024;
/// A stream's receive window at the one who accepts: requests, bodies.
const STREAM_WINDOW_BYTES: u32 = 256 << 10;
/// The same at a balancer that dials an agent: a client that stalls holds back no more than this.
const ANSWER_WINDOW_BYTES: u32 = 64 << 10;
/// Handshakes under way at once; further ones wait in QUIC's own bounded queue.
const MAX_HANDSHAKES: usize = 256;
/// Of them, those that began just now: when a thousand peers come back at once, some are done soon and
/// the others wait, instead of all being late together and beginning anew.
const MAX_STARTING: usize = 64;
/// A handshake that takes longer waits for its peer rather than for us, and another one may begin.
const STARTING: Duration = Duration::from_millis(200);
/// Links that were accepted and not yet taken by [`Endpoint::accept`].
const MAX_ACCEPTED: usize = 256;
/// From the first packet to both Hellos.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(3);
/// Packets that are acknowledged together, and how long the first of them waits for that.
const ACK_EVERY: u32 = 16;
const ACK_WITHIN: Duration = Duration::from_millis(5);
const KEEP_ALIVE: Duration = Duration::from_secs(2);
/// Least time between two stateless resets: none. QUIC's default of 20 ms is for hosts that strangers may
/// write to; here everyone who spoke to a process that was killed speaks to the next one within a moment,
/// and who is not told takes its link for alive for up to seconds. Any time at all would let one of the
/// packets that were read together be answered and drop the rest. A reset is smaller than what it
/// answers, so there is neither a loop nor an amplification.
const RESET_EVERY: Duration = Duration::ZERO;
/// Taken for a round trip until one was measured. A first packet that nobody answered goes again after
/// three of these, then after twice that, and so on: a peer that has just started, whose predecessor was
/// dialled, must not wait for a second, as QUIC's default of 333 ms would have it.
const INITIAL_RTT: Duration = Duration::from_millis(30);
const IDLE_TIMEOUT: Duration = Duration::from_secs(10);
const SOCKET_BUFFER_BYTES: usize = 4 << 20;

/// Why an address could not be bound.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    /// Somebody else has the port.
    #[error("{0} is taken by another process: stop it, or listen elsewhere")]
    Taken(SocketAddr),
    /// The address cannot be bound.
    #[error("cannot listen on {address}: {error}")]
    Io {
        /// The address.
        address: SocketAddr,
        /// What the system says.
        error: io::Error,
    },
    /// TLS refuses the credentials.
    #[error(transparent)]
    Credentials(#[from] CredentialsError),
}

/// Why there is no link.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConnectError {
    /// The address does not resolve.
    #[error("{address} does not resolve: {problem}")]
    Resolve {
        /// What was given.
        address: String,
        /// What the resolver says.
        problem: String,
    },
    /// Nobody answered in time.
    #[error("{address} does not answer")]
    NoAnswer {
        /// Where.
        address: String,
    },
    /// The handshake failed: other CA, expired certificate, not our protocol.
    #[error("no trust between us and {address}: {problem}")]
    Handshake {
        /// Where.
        address: String,
        /// What TLS says.
        problem: String,
    },
    /// Somebody answers, but not whom we wanted.
    #[error("{address} is {found}, not {expected}: check the address and its certificate")]
    WrongPeer {
        /// Where.
        address: String,
        /// Who answered.
        found: String,
        /// Whom we wanted.
        expected: String,
    },
    /// The peer turned us away.
    #[error("{address} turned us away: {reason}")]
    TurnedAway {
        /// Where.
        address: String,
        /// What it said.
        reason: String,
    },
    /// No protocol version in common.
    #[error(
        "{address} speaks protocol {min} to {max}, we speak {}: upgrade the older",
        versions()
    )]
    Version {
        /// Where.
        address: String,
        /// Its oldest.
        min: u32,
        /// Its newest.
        max: u32,
    },
}

fn versions() -> String {
    format!("{} to {}", PROTOCOL.start(), PROTOCOL.end())
}

/// Whom a dialler wants to reach.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Expect {
    /// Its role.
    pub role: Role,
    /// Its name, where the facts give one for the address.
    pub name: Option<String>,
}

impl Expect {
    /// Anyone of this role.
    #[must_use]
    pub const fn role(role: Role) -> Self {
        Self { role, name: None }
    }

    /// Exactly this one.
    #[must_use]
    pub fn named(role: Role, name: &str) -> Self {
        Self {
            role,
            name: Some(name.into()),
        }
    }

    fn fits(&self, peer: &Identity) -> bool {
        self.role == peer.role && self.name.as_ref().is_none_or(|name| *name == peer.name)
    }

    fn describe(&self) -> String {
        match &self.name {
            Some(name) => format!("{}/{name}", self.role),
            None => format!("a {}", self.role),
        }
    }
}

/// A UDP socket that dials and accepts links. Cheap to clone.
#[derive(Clone)]
pub struct Endpoint {
    inner: quinn::Endpoint,
    shared: Arc<Shared>,
    accepted: Arc<tokio::sync::Mutex<mpsc::Receiver<Link>>>,
}

struct Shared {
    identity: Identity,
    hello: Mutex<Hello>,
    clients: [(Alpn, quinn::ClientConfig); 3],
}

impl Endpoint {
    /// Listens on `address` for these protocols, and dials from it.
    ///
    /// Must be called within a tokio runtime.
    ///
    /// # Errors
    ///
    /// Returns [`BindError`] with what to do.
    pub fn bind(
        address: SocketAddr,
        credentials: &Credentials,
        alpns: &[Alpn],
    ) -> Result<Self, BindError> {
        let socket = socket(address).map_err(|error| match error.kind() {
            io::ErrorKind::AddrInUse => BindError::Taken(address),
            _ => BindError::Io { address, error },
        })?;
        let server = (!alpns.is_empty())
            .then(|| server_config(credentials, alpns))
            .transpose()?;
        let runtime = Arc::new(quinn::TokioRuntime);
        let inner = quinn::Endpoint::new(endpoint_config(credentials), server, socket, runtime)
            .map_err(|error| BindError::Io { address, error })?;
        let shared = Arc::new(Shared {
            identity: credentials.identity().clone(),
            hello: Mutex::new(Hello {
                min: *PROTOCOL.start(),
                max: *PROTOCOL.end(),
                feature_level: forebay_proto::FEATURE_LEVEL,
                build: concat!("forebay/", env!("CARGO_PKG_VERSION")).into(),
                boot: rand::random(),
                ..Hello::default()
            }),
            clients: client_configs(credentials)?,
        });
        let (sender, receiver) = mpsc::channel(MAX_ACCEPTED);
        if !alpns.is_empty() {
            tokio::spawn(accept_loop(inner.clone(), shared.clone(), sender));
        }
        Ok(Self {
            inner,
            shared,
            accepted: Arc::new(tokio::sync::Mutex::new(receiver)),
        })
    }

    /// Dials only, from any free port.
    ///
    /// # Errors
    ///
    /// As [`Endpoint::bind`].
    pub fn client(credentials: &Credentials) -> Result<Self, BindError> {
        Self::bind(([0, 0, 0, 0], 0).into(), credentials, &[])
    }

    /// Our own identity.
    #[must_use]
    pub fn identity(&self) -> &Identity {
        &self.shared.identity
    }

    /// The address that is bound.
    ///
    /// # Errors
    ///
    /// Returns what the system says.
    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        self.inner.local_addr()
    }

    /// Changes what later Hellos say beyond version and build: cluster, node, store, incarnation.
    pub fn update_hello(&self, change: impl FnOnce(&mut Hello)) {
        change(&mut self.shared.hello.lock());
    }

    /// The next link that a peer made, or `None` after [`Endpoint::close`].
    pub async fn accept(&self) -> Option<Link> {
        self.accepted.lock().await.recv().await
    }

    /// Dials `address` (`host:port`), checks who answers, and says Hello.
    ///
    /// # Errors
    ///
    /// Returns [`ConnectError`] within `patience` and a little.
    pub async fn connect(
        &self,
        address: &str,
        alpn: Alpn,
        expect: &Expect,
        patience: Duration,
    ) -> Result<Link, ConnectError> {
        tokio::time::timeout(patience, self.dial(address, alpn, expect))
            .await
            .unwrap_or_else(|_| {
                Err(ConnectError::NoAnswer {
                    address: address.into(),
                })
            })
    }

    async fn dial(&self, address: &str, alpn: Alpn, expect: &Expect) -> Result<Link, ConnectError> {
        let resolve = |problem: String| ConnectError::Resolve {
            address: address.into(),
            problem,
        };
        let socket_address = tokio::net::lookup_host(address)
            .await
            .map_err(|error| resolve(error.to_string()))?
            .find(|found| found.is_ipv4() || self.inner.local_addr().is_ok_and(|own| own.is_ipv6()))
            .ok_or_else(|| resolve("no usable address".into()))?;
        let config = self.shared.clients.iter().find(|(each, _)| *each == alpn);
        let (_, config) = config.expect("there is a configuration for each protocol");
        let connecting = self
            .inner
            .connect_with(config.clone(), socket_address, "forebay")
            .map_err(|error| resolve(error.to_string()))?;
        let failed = |error: &quinn::ConnectionError| match LinkClosed::from(error) {
            LinkClosed::Silent => ConnectError::NoAnswer {
                address: address.into(),
            },
            LinkClosed::Peer { reason, .. } => ConnectError::TurnedAway {
                address: address.into(),
                reason,
            },
            other => ConnectError::Handshake {
                address: address.into(),
                problem: other.to_string(),
            },
        };
        let connection = connecting.await.map_err(|error| failed(&error))?;
        let peer = identity_behind(&connection).map_err(|problem| {
            connection.close(Code::Identity.var(), problem.as_bytes());
            ConnectError::Handshake {
                address: address.into(),
                problem,
            }
        })?;
        if !expect.fits(&peer) {
            connection.close(Code::Identity.var(), b"not whom I wanted");
            return Err(ConnectError::WrongPeer {
                address: address.into(),
                found: peer.short(),
                expected: expect.describe(),
            });
        }
        let gone = || match connection.close_reason() {
            Some(error) => failed(&error),
            None => ConnectError::NoAnswer {
                address: address.into(),
            },
        };
        let (send, recv) = connection.open_bi().await.map_err(|error| failed(&error))?;
        let (mut send, mut recv) = (FrameSender::new(send), FrameReceiver::new(recv));
        send.send(&self.shared.hello()).await.map_err(|_| gone())?;
        send.finish();
        let hello = receive_hello(&mut recv).await.ok_or_else(gone)?;
        if !compatible(&hello) {
            connection.close(Code::Version.var(), b"no protocol version in common");
            let (min, max) = (hello.min, hello.max);
            return Err(ConnectError::Version {
                address: address.into(),
                min,
                max,
            });
        }
        Ok(Link::new(connection, peer, hello, alpn))
    }

    /// Ends every connection and stops accepting.
    pub fn close(&self, reason: &str) {
        self.inner.close(Code::Shutdown.var(), reason.as_bytes());
    }

    /// Waits until the peers of every closed connection were told, at most a second.
    pub async fn wait_idle(&self) {
        // Peers that do not answer find out by themselves.
        let _ = tokio::time::timeout(Duration::from_secs(1), self.inner.wait_idle()).await;
    }
}

impl Shared {
    fn hello(&self) -> Frame {
        Frame::message(Kind::Hello, &*self.hello.lock())
    }
}

async fn accept_loop(endpoint: quinn::Endpoint, shared: Arc<Shared>, accepted: mpsc::Sender<Link>) {
    let handshakes = Arc::new(Semaphore::new(MAX_HANDSHAKES));
    let starts = Arc::new(Semaphore::new(MAX_STARTING));
    // The semaphore is never closed.
    while let Ok(start) = starts.clone().acquire_owned().await
        && let Some(incoming) = endpoint.accept().await
    {
        let Ok(permit) = handshakes.clone().try_acquire_owned() else {
            // Unproven addresses pay a round trip when many knock at once.
            if incoming.may_retry() {
                let _ = incoming.retry();
            } else {
                incoming.refuse();
            }
            continue;
        };
        let (shared, accepted) = (shared.clone(), accepted.clone());
        tokio::spawn(async move {
            let remote = incoming.remote_address();
            let mut welcoming = pin!(tokio::time::timeout(
                HANDSHAKE_TIMEOUT,
                welcome(incoming, &shared)
            ));
            let welcomed = match tokio::time::timeout(STARTING, welcoming.as_mut()).await {
                Ok(welcomed) => welcomed,
                Err(_) => {
                    drop(start);
                    welcoming.await
                }
            };
            match welcomed {
                Ok(Ok(link)) => {
                    // The receiver lives as long as the endpoint. A link that nobody takes counts as a handshake.
                    let _ = accepted.send(link).await;
                    drop(permit);
                }
                Ok(Err(NotWelcome::TurnedAway(problem))) => {
                    tracing::info!(%remote, problem, "turned a peer away");
                }
                Ok(Err(NotWelcome::Left(why))) => {
                    tracing::debug!(%remote, why, "a peer left during its handshake");
                }
                Err(_) => tracing::info!(%remote, "a peer did not finish its handshake"),
            }
        });
    }
}

/// Why there is no link to somebody who knocked.
enum NotWelcome {
    /// We do not trust it, or it does not speak as it must.
    TurnedAway(String),
    /// It went away by itself: callers that hedge do.
    Left(String),
}

impl From<quinn::ConnectionError> for NotWelcome {
    fn from(error: quinn::ConnectionError) -> Self {
        let said = printable(error.to_string().as_bytes());
        match error {
            quinn::ConnectionError::TransportError(_) | quinn::ConnectionError::VersionMismatch => {
                Self::TurnedAway(said)
            }
            _ => Self::Left(said),
        }
    }
}

async fn welcome(incoming: quinn::Incoming, shared: &Shared) -> Result<Link, NotWelcome> {
    let connection = incoming.accept()?.await?;
    let turn_away = |code: Code, problem: String| {
        connection.close(code.var(), problem.as_bytes());
        NotWelcome::TurnedAway(problem)
    };
    let alpn =
        spoken(&connection).ok_or_else(|| turn_away(Code::Protocol, "no protocol".into()))?;
    let peer =
        identity_behind(&connection).map_err(|problem| turn_away(Code::Identity, problem))?;
    if !alpn.admits(peer.role) {
        let protocol = String::from_utf8_lossy(alpn.name());
        let problem = format!(
            "{} may not speak {protocol} to {}",
            peer.short(),
            shared.identity.short()
        );
        return Err(turn_away(Code::Identity, problem));
    }
    let (send, recv) = connection.accept_bi().await?;
    let (mut send, mut recv) = (FrameSender::new(send), FrameReceiver::new(recv));
    let hello = receive_hello(&mut recv)
        .await
        .ok_or_else(|| turn_away(Code::Protocol, "the first frame is not a Hello".into()))?;
    send.send(&shared.hello())
        .await
        .map_err(|error| NotWelcome::Left(error.to_string()))?;
    send.finish();
    if !compatible(&hello) {
        let problem = format!("no protocol version in common: I speak {}", versions());
        return Err(turn_away(Code::Version, problem));
    }
    Ok(Link::new(connection, peer, hello, alpn))
}

async fn receive_hello(recv: &mut FrameReceiver) -> Option<Hello> {
    match recv.recv().await {
        Ok(Some(frame)) if frame.kind == Kind::Hello => frame.decode().ok(),
        _ => None,
    }
}

const fn compatible(hello: &Hello) -> bool {
    hello.min <= *PROTOCOL.end() && hello.max >= *PROTOCOL.start()
}

fn spoken(connection: &quinn::Connection) -> Option<Alpn> {
    let data = connection
        .handshake_data()?
        .downcast::<HandshakeData>()
        .ok()?;
    let name = data.protocol?;
    Alpn::ALL.into_iter().find(|alpn| alpn.name() == name)
}

fn identity_behind(connection: &quinn::Connection) -> Result<Identity, String> {
    let certificates = connection
        .peer_identity()
        .and_then(|any| any.downcast::<Vec<CertificateDer<'static>>>().ok())
        .ok_or("the peer has no certificate")?;
    let leaf = certificates.first().ok_or("the peer has no certificate")?;
    peer_identity(leaf).map_err(|error| error.to_string())
}

fn socket(address: SocketAddr) -> io::Result<UdpSocket> {
    let domain = socket2::Domain::for_address(address);
    let socket = socket2::Socket::new(domain, socket2::Type::DGRAM, Some(socket2::Protocol::UDP))?;
    socket.set_nonblocking(true)?;
    // The kernel grants what its limits allow; less is slower, not wrong.
    let _ = socket.set_recv_buffer_size(SOCKET_BUFFER_BYTES);
    let _ = socket.set_send_buffer_size(SOCKET_BUFFER_BYTES);
    socket.bind(&address.into())?;
    Ok(socket.into())
}

/// Keys derived from the private key, so that a restarted process can tell the peers of its
/// predecessor, by stateless reset, that their connections are gone.
fn endpoint_config(credentials: &Credentials) -> quinn::EndpointConfig {
    let derive = |label: &[u8]| {
        let mut context = digest::Context::new(&digest::SHA256);
        context.update(label);
        context.update(credentials.key.secret_der());
        context.finish()
    };
    let reset_key = hmac::Key::new(
        hmac::HMAC_SHA256,
        derive(b"forebay stateless reset").as_ref(),
    );
    let cid_seed = derive(b"forebay connection ids");
    let cid_key = u64::from_be_bytes(cid_seed.as_ref()[..8].try_into().expect("eight bytes"));
    let mut config = quinn::EndpointConfig::new(Arc::new(reset_key));
    config.min_reset_interval(RESET_EVERY);
    config.cid_generator(move || {
        Box::new(quinn_proto::HashedConnectionIdGenerator::from_key(cid_key))
    });
    config
}

fn transport(stream_window_bytes: u32) -> Arc<quinn::TransportConfig> {
    let mut transport = quinn::TransportConfig::default();
    let all_streams = u64::from(stream_window_bytes) * u64::from(MAX_STREAMS);
    transport
        .max_concurrent_bidi_streams(MAX_STREAMS.into())
        .max_concurrent_uni_streams(16_u32.into())
        .initial_rtt(INITIAL_RTT)
        .stream_receive_window(stream_window_bytes.into())
        .receive_window(quinn::VarInt::from_u64(all_streams).expect("below 2^62"))
        .send_window(all_streams)
        .keep_alive_interval(Some(KEEP_ALIVE))
        .max_idle_timeout(Some(IDLE_TIMEOUT.try_into().expect("ten seconds fit")))
        .datagram_receive_buffer_size(Some(256 << 10))
        .datagram_send_buffer_size(256 << 10)
        .ack_frequency_config(Some(acks()));
    Arc::new(transport)
}

/// An answer is many small packets one way: each second of them would be acknowledged by one of its own.
fn acks() -> quinn::AckFrequencyConfig {
    let mut acks = quinn::AckFrequencyConfig::default();
    acks.ack_eliciting_threshold(ACK_EVERY.into())
        .max_ack_delay(Some(ACK_WITHIN));
    acks
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

fn unusable(credentials: &Credentials, error: &dyn std::fmt::Display) -> CredentialsError {
    CredentialsError::Pair {
        cert: credentials.paths.cert.clone(),
        key: credentials.paths.key.clone(),
        error: error.to_string(),
    }
}

fn server_config(
    credentials: &Credentials,
    alpns: &[Alpn],
) -> Result<quinn::ServerConfig, CredentialsError> {
    let domain = credentials.identity().trust_domain.clone();
    let verifier = ClientVerifier::new(credentials.roots.clone(), domain, provider())
        .map_err(|error| unusable(credentials, &error))?;
    let mut tls = rustls::ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(|error| unusable(credentials, &error))?
        .with_client_cert_verifier(Arc::new(verifier))
        .with_single_cert(credentials.chain.clone(), credentials.key.clone_key())
        .map_err(|error| unusable(credentials, &error))?;
    tls.alpn_protocols = alpns.iter().map(|alpn| alpn.name().to_vec()).collect();
    let crypto = QuicServerConfig::try_from(tls).map_err(|error| unusable(credentials, &error))?;
    let mut config = quinn::ServerConfig::with_crypto(Arc::new(crypto));
    config
        .transport_config(transport(STREAM_WINDOW_BYTES))
        .migration(false)
        .max_incoming(1_024)
        .incoming_buffer_size(64 << 10)
        .incoming_buffer_size_total(16 << 20);
    Ok(config)
}

fn client_configs(
    credentials: &Credentials,
) -> Result<[(Alpn, quinn::ClientConfig); 3], CredentialsError> {
    let verifier = Arc::new(ServerVerifier {
        roots: credentials.roots.clone(),
        trust_domain: credentials.identity().trust_domain.clone(),
        provider: provider(),
    });
    let config = |alpn: Alpn| {
        let mut tls = rustls::ClientConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(|error| unusable(credentials, &error))?
            .dangerous()
            .with_custom_certificate_verifier(verifier.clone())
            .with_client_auth_cert(credentials.chain.clone(), credentials.key.clone_key())
            .map_err(|error| unusable(credentials, &error))?;
        tls.alpn_protocols = vec![alpn.name().to_vec()];
        let crypto =
            QuicClientConfig::try_from(tls).map_err(|error| unusable(credentials, &error))?;
        let mut config = quinn::ClientConfig::new(Arc::new(crypto));
        let window = match alpn {
            Alpn::Work => ANSWER_WINDOW_BYTES,
            Alpn::Raft | Alpn::Control => STREAM_WINDOW_BYTES,
        };
        config.transport_config(transport(window));
        Ok((alpn, config))
    };
    let [raft, control, work] = Alpn::ALL;
    Ok([config(raft)?, config(control)?, config(work)?])
}
