//! One connection to a peer that is known.

use std::fmt;
use std::future::Future;
use std::net::SocketAddr;
use std::pin::pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use forebay_proto::frame::{Decoder, Frame};
use forebay_proto::wire::Hello;
use forebay_proto::{Identity, Role};

use crate::Code;
use crate::stream::{FrameReceiver, FrameSender};

/// What is spoken on a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Alpn {
    /// Raft messages between control nodes.
    Raft,
    /// RPCs of the control plane.
    Control,
    /// Placements and reports.
    Work,
}

impl Alpn {
    pub(crate) const ALL: [Self; 3] = [Self::Raft, Self::Control, Self::Work];

    pub(crate) const fn name(self) -> &'static [u8] {
        match self {
            Self::Raft => b"forebay-raft/1",
            Self::Control => b"forebay-control/1",
            Self::Work => b"forebay-work/1",
        }
    }

    /// Whether a peer of this role may connect at all; which RPC it may call is checked at each.
    pub(crate) const fn admits(self, role: Role) -> bool {
        match self {
            Self::Raft => matches!(role, Role::Control),
            Self::Control => true,
            Self::Work => matches!(role, Role::Balancer),
        }
    }
}

/// Why a stream could not be opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum OpenError {
    /// As many streams are open as the peer allows.
    #[error("too many streams are open to this peer")]
    Full,
    /// The connection is gone.
    #[error("the connection is gone")]
    Lost,
}

/// How a connection ended.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LinkClosed {
    /// The peer closed it; the number is its [`Code`].
    #[error("the peer closed the connection (code {code}): {reason}")]
    Peer {
        /// Its code.
        code: u64,
        /// What it said, cut and without control characters.
        reason: String,
    },
    /// The peer's process is gone: another answers at its address.
    #[error("the peer's process is gone (stateless reset)")]
    Reset,
    /// Nothing was heard for too long.
    #[error("nothing was heard from the peer for too long")]
    Silent,
    /// We closed it.
    #[error("closed by this side")]
    Local,
    /// Anything else that QUIC says.
    #[error("{0}")]
    Transport(String),
}

impl From<&quinn::ConnectionError> for LinkClosed {
    fn from(error: &quinn::ConnectionError) -> Self {
        use quinn::ConnectionError as E;
        match error {
            E::ApplicationClosed(close) => Self::Peer {
                code: close.error_code.into_inner(),
                reason: printable(&close.reason),
            },
            E::Reset => Self::Reset,
            E::TimedOut => Self::Silent,
            E::LocallyClosed => Self::Local,
            other => Self::Transport(printable(other.to_string().as_bytes())),
        }
    }
}

/// What a peer says of itself, fit for a terminal.
pub(crate) fn printable(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes)
        .chars()
        .filter(|character| !character.is_control())
        .take(300)
        .collect()
}

/// One connection to a peer that is known. Cheap to clone; the connection closes with the last.
#[derive(Clone)]
pub struct Link {
    connection: quinn::Connection,
    about: Arc<About>,
}

struct About {
    peer: Identity,
    hello: Hello,
    alpn: Alpn,
    remote: SocketAddr,
}

impl fmt::Debug for Link {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} at {}", self.about.peer.short(), self.about.remote)
    }
}

impl Link {
    pub(crate) fn new(
        connection: quinn::Connection,
        peer: Identity,
        hello: Hello,
        alpn: Alpn,
    ) -> Self {
        let remote = connection.remote_address();
        Self {
            connection,
            about: Arc::new(About {
                peer,
                hello,
                alpn,
                remote,
            }),
        }
    }

    /// Whom the peer's certificate names.
    #[must_use]
    pub fn peer(&self) -> &Identity {
        &self.about.peer
    }

    /// What the peer said first.
    #[must_use]
    pub fn hello(&self) -> &Hello {
        &self.about.hello
    }

    /// What is spoken.
    #[must_use]
    pub fn alpn(&self) -> Alpn {
        self.about.alpn
    }

    /// The peer's address.
    #[must_use]
    pub fn remote(&self) -> SocketAddr {
        self.about.remote
    }

    /// Opens a bidirectional stream, without waiting.
    ///
    /// # Errors
    ///
    /// Returns [`OpenError::Full`] at the peer's limit: refuse, do not queue.
    pub fn open(&self) -> Result<(FrameSender, FrameReceiver), OpenError> {
        let (send, recv) = at_once(self.connection.open_bi())?;
        Ok((FrameSender::new(send), FrameReceiver::new(recv)))
    }

    /// Opens a stream from here to the peer, without waiting.
    ///
    /// # Errors
    ///
    /// As [`Link::open`].
    pub fn open_one_way(&self) -> Result<FrameSender, OpenError> {
        at_once(self.connection.open_uni()).map(FrameSender::new)
    }

    /// The next bidirectional stream that the peer opens. Cancel safe.
    ///
    /// # Errors
    ///
    /// Returns how the connection ended.
    pub async fn accept(&self) -> Result<(FrameSender, FrameReceiver), LinkClosed> {
        let (send, recv) = self
            .connection
            .accept_bi()
            .await
            .map_err(|error| LinkClosed::from(&error))?;
        Ok((FrameSender::new(send), FrameReceiver::new(recv)))
    }

    /// The next one-way stream that the peer opens. Cancel safe.
    ///
    /// # Errors
    ///
    /// Returns how the connection ended.
    pub async fn accept_one_way(&self) -> Result<FrameReceiver, LinkClosed> {
        let recv = self
            .connection
            .accept_uni()
            .await
            .map_err(|error| LinkClosed::from(&error))?;
        Ok(FrameReceiver::new(recv))
    }

    /// Sends a frame as a datagram. It may be lost, late or dropped for newer ones; whether it was
    /// handed to the network is all that is known.
    pub fn send_datagram(&self, frame: &Frame) -> bool {
        let Ok(header) = frame.header() else {
            return false;
        };
        let mut bytes = Vec::with_capacity(header.len() + frame.payload.len());
        bytes.extend_from_slice(&header);
        bytes.extend_from_slice(&frame.payload);
        self.connection.send_datagram(bytes.into()).is_ok()
    }

    /// The next datagram that is one whole frame; others are passed over. Cancel safe.
    ///
    /// # Errors
    ///
    /// Returns how the connection ended.
    pub async fn read_datagram(&self) -> Result<Frame, LinkClosed> {
        loop {
            let bytes = self
                .connection
                .read_datagram()
                .await
                .map_err(|error| LinkClosed::from(&error))?;
            let mut decoder = Decoder::default();
            decoder.push(bytes);
            if let Ok(Some(frame)) = decoder.pop() {
                return Ok(frame);
            }
        }
    }

    /// Ends the connection and every stream on it.
    pub fn close(&self, code: Code, reason: &str) {
        self.connection.close(code.var(), reason.as_bytes());
    }

    /// Waits for the end of the connection.
    pub async fn closed(&self) -> LinkClosed {
        LinkClosed::from(&self.connection.closed().await)
    }

    /// How the connection ended, if it has.
    #[must_use]
    pub fn close_reason(&self) -> Option<LinkClosed> {
        self.connection
            .close_reason()
            .as_ref()
            .map(LinkClosed::from)
    }

    /// Round trip as QUIC estimates it.
    #[must_use]
    pub fn rtt(&self) -> Duration {
        self.connection.rtt()
    }
}

/// Takes a future's value if it is there at the first look.
fn at_once<T>(
    opening: impl Future<Output = Result<T, quinn::ConnectionError>>,
) -> Result<T, OpenError> {
    match pin!(opening).poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(Ok(streams)) => Ok(streams),
        Poll::Ready(Err(_)) => Err(OpenError::Lost),
        Poll::Pending => Err(OpenError::Full),
    }
}
