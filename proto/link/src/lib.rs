//! QUIC links between the parts: mutual TLS, identities, framed streams, reconnecting.
//!
//! A [`Link`] exists only once both certificates chain to the cell's CA, the peer has the role that
//! was expected, and both sides have said a compatible `Hello`. There is no policy here: which role
//! may call what is `proto::rpc`'s, what to do about a lost link its user's.

mod backoff;
mod credentials;
mod endpoint;
mod link;
mod pki;
mod reachability;
mod stream;
mod verify;

pub use backoff::Backoff;
pub use credentials::{CredentialPaths, Credentials, CredentialsError, Validity};
pub use endpoint::{BindError, ConnectError, Endpoint, Expect};
pub use link::{Alpn, Link, LinkClosed, OpenError};
pub use pki::{Authority, Issued, PkiError};
pub use reachability::{Reachability, probe};
pub use stream::{FrameReceiver, FrameSender, RecvError, SendError};

/// Newest and oldest protocol version this build speaks.
pub const PROTOCOL: std::ops::RangeInclusive<u32> = 1..=1;

/// Why a connection or a stream was ended on purpose; travels as the QUIC application code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Code {
    /// All was said.
    Normal = 0,
    /// No protocol version in common.
    Version = 1,
    /// The peer is not whom it was expected to be, or its role may not speak this protocol.
    Identity = 2,
    /// The peer broke the protocol.
    Protocol = 3,
    /// The process stops.
    Shutdown = 4,
    /// Nobody waits for this any more.
    Cancelled = 5,
    /// A newer link or a newer incarnation took over.
    Superseded = 6,
    /// The peer belonged to the group and does not any more.
    Removed = 7,
}

impl Code {
    pub(crate) fn var(self) -> quinn::VarInt {
        quinn::VarInt::from_u32(self as u32)
    }
}
