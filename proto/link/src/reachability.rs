//! Death is not silence: is anybody listening at an address?
//!
//! A process that was killed says nothing over UDP. A datagram from a *connected* socket to its
//! port draws an ICMP "port unreachable" from a living host, which the kernel hands to that socket
//! as `ECONNREFUSED`; a process that is only slow draws nothing.

use std::io::ErrorKind;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use tokio::net::UdpSocket;

/// What a probe found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reachability {
    /// Nobody listens at this port: the process is gone.
    Gone,
    /// No answer, which says nothing: it may be busy, frozen, or cut off.
    Silent,
}

/// Asks the kernel whether somebody listens at `address`, waiting at most `patience`.
pub async fn probe(address: SocketAddr, patience: Duration) -> Reachability {
    let local: SocketAddr = match address {
        SocketAddr::V4(_) => (Ipv4Addr::UNSPECIFIED, 0).into(),
        SocketAddr::V6(_) => (Ipv6Addr::UNSPECIFIED, 0).into(),
    };
    let asking = async {
        let socket = UdpSocket::bind(local).await?;
        socket.connect(address).await?;
        // One byte is no QUIC packet: a living endpoint drops it unanswered.
        socket.send(&[0]).await?;
        socket.recv(&mut [0; 16]).await
    };
    match tokio::time::timeout(patience, asking).await {
        Ok(Err(error)) if error.kind() == ErrorKind::ConnectionRefused => Reachability::Gone,
        _ => Reachability::Silent,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_closed_port_is_gone_and_an_open_one_is_silent() {
        let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let address = socket.local_addr().unwrap();
        let patience = Duration::from_millis(50);
        assert_eq!(probe(address, patience).await, Reachability::Silent);
        drop(socket);
        assert_eq!(probe(address, patience).await, Reachability::Gone);
    }
}
