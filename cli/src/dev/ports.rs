//! Ports of a fleet on one machine.
//!
//! They are kept over restarts, so they are taken from below the range that the system hands out
//! to outgoing connections.

use std::collections::BTreeSet;
use std::net::{Ipv4Addr, SocketAddr, TcpListener, UdpSocket};

use rand::Rng as _;

use super::DevError;

/// Free ports that were handed out or are in use by the fleet.
#[derive(Debug, Default)]
pub(super) struct Ports {
    taken: BTreeSet<u16>,
}

impl Ports {
    /// Keeps a port from being handed out.
    pub(super) fn reserve(&mut self, address: SocketAddr) {
        self.taken.insert(address.port());
    }

    /// A loopback address whose port nobody has, neither for TCP nor for UDP.
    pub(super) fn free(&mut self) -> Result<SocketAddr, DevError> {
        let mut rng = rand::rng();
        for _ in 0..TRIES {
            let address = SocketAddr::from((Ipv4Addr::LOCALHOST, rng.random_range(RANGE)));
            if !self.taken.contains(&address.port()) && is_free(address) {
                self.reserve(address);
                return Ok(address);
            }
        }
        Err(DevError::NoPort)
    }
}

/// Whether nobody has this address, neither for TCP nor for UDP.
pub(super) fn is_free(address: SocketAddr) -> bool {
    TcpListener::bind(address).is_ok() && UdpSocket::bind(address).is_ok()
}

/// The client addresses: `count` ports from `first` on, all of them free.
pub(super) fn consecutive(first: SocketAddr, count: u16) -> Result<Vec<SocketAddr>, DevError> {
    if first.port() == 0 || first.port().checked_add(count - 1).is_none() {
        return Err(DevError::Ports(first, count));
    }
    let addresses: Vec<SocketAddr> = (0..count)
        .map(|n| SocketAddr::new(first.ip(), first.port() + n))
        .collect();
    for &address in &addresses {
        TcpListener::bind(address).map_err(|error| DevError::Listen { address, error })?;
    }
    Ok(addresses)
}

const RANGE: std::ops::Range<u16> = 20_000..32_000;
const TRIES: u32 = 1_000;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_beyond_the_last_one_are_refused() {
        let at = |port| SocketAddr::from((Ipv4Addr::LOCALHOST, port));
        for (port, count) in [(0, 1), (65_535, 2)] {
            let error = consecutive(at(port), count).unwrap_err();
            assert!(matches!(error, DevError::Ports(..)), "{error}");
        }
    }
}
