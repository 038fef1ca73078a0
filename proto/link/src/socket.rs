//! The UDP socket under an endpoint: batches that are larger than what the system takes at once are halved.
//!
//! quinn sends up to ten packets by one call, whatever their size; where packets are as large as jumbo frames
//! allow, that is more than a UDP datagram may have, and the whole batch would be lost.

use std::io::{self, IoSliceMut};
use std::net::{SocketAddr, UdpSocket};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use quinn::udp::{RecvMeta, Transmit};
use quinn::{AsyncUdpSocket, Runtime, TokioRuntime, UdpPoller};

/// Largest packet that is tried for: jumbo frames (9,000 bytes) less the headers of IPv6 and UDP. What gets
/// through is found out on each path.
pub(crate) const MAX_PACKET_BYTES: u16 = 8_952;
/// Most bytes that one call sends, or receives: those of a UDP datagram.
const MAX_BATCH_BYTES: usize = 65_507;

/// A socket of tokio's with that bound.
#[derive(Debug)]
pub(crate) struct Socket(Arc<dyn AsyncUdpSocket>);

impl Socket {
    pub(crate) fn new(socket: UdpSocket) -> io::Result<Arc<Self>> {
        Ok(Arc::new(Self(TokioRuntime.wrap_udp_socket(socket)?)))
    }
}

impl AsyncUdpSocket for Socket {
    fn create_io_poller(self: Arc<Self>) -> Pin<Box<dyn UdpPoller>> {
        self.0.clone().create_io_poller()
    }

    fn try_send(&self, transmit: &Transmit<'_>) -> io::Result<()> {
        for contents in batches(transmit.contents, transmit.segment_size) {
            let batch = Transmit {
                destination: transmit.destination,
                ecn: transmit.ecn,
                contents,
                segment_size: transmit.segment_size.filter(|size| *size < contents.len()),
                src_ip: transmit.src_ip,
            };
            // Should a later one find no room, the earlier go again with it: QUIC drops what came twice.
            self.0.try_send(&batch)?;
        }
        Ok(())
    }

    fn poll_recv(
        &self,
        context: &mut Context<'_>,
        buffers: &mut [IoSliceMut<'_>],
        meta: &mut [RecvMeta],
    ) -> Poll<io::Result<usize>> {
        self.0.poll_recv(context, buffers, meta)
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.0.local_addr()
    }

    fn may_fragment(&self) -> bool {
        self.0.may_fragment()
    }

    fn max_transmit_segments(&self) -> usize {
        self.0.max_transmit_segments()
    }

    /// quinn makes room for so many packets of the largest size; the system joins no more than a datagram's bytes.
    fn max_receive_segments(&self) -> usize {
        let largest = MAX_BATCH_BYTES.div_ceil(MAX_PACKET_BYTES.into());
        self.0.max_receive_segments().min(largest)
    }
}

/// What is sent by one call each.
fn batches(contents: &[u8], segment_bytes: Option<usize>) -> impl Iterator<Item = &[u8]> {
    let whole = segment_bytes.map_or(contents.len(), |size| MAX_BATCH_BYTES / size.max(1) * size);
    contents.chunks(whole.max(1))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(bytes: usize, segment: Option<usize>, expected: &[usize]) {
        let contents = vec![0; bytes];
        let sizes: Vec<_> = batches(&contents, segment).map(<[u8]>::len).collect();
        assert_eq!(sizes, expected, "{bytes} bytes by {segment:?}");
    }

    #[test]
    fn no_batch_is_larger_than_a_datagram_and_none_cuts_a_packet() {
        check(1_200, None, &[1_200]);
        check(65_507, None, &[65_507]);
        check(14_520, Some(1_452), &[14_520]);
        check(89_520, Some(8_952), &[62_664, 26_856]);
        check(62_664, Some(8_952), &[62_664]);
        check(63_000, Some(8_952), &[62_664, 336]);
    }
}
