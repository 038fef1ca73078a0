//! Snapshots between members: in pieces, on a stream that gives way to all others.
//!
//! A state of many megabytes must delay neither a heartbeat nor a commit, nor may a peer make this
//! node hold more than one of them. See docs/wire.md, "A snapshot".

use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use forebay_link::{Code, FrameReceiver, FrameSender, Link};
use forebay_proto::NodeId;
use forebay_proto::frame::{Frame, Kind};
use forebay_proto::wire::raft as proto;
use tokio::sync::{Semaphore, watch};
use tokio::time::timeout;

use crate::node::{MAX_SNAPSHOT_BYTES, Message, SnapshotReport, wire};
use crate::replica::ReplicaHandle;

/// Snapshots under way from this node; more wait for their turn.
const MAX_OUTBOUND: usize = 2;

/// How a snapshot is sent.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Pace {
    /// Bytes of a piece.
    piece_bytes: usize,
    /// Between two pieces, so that the peer and this node do something else, too.
    pause: Duration,
    /// A piece that does not move for so long: the peer is taken for gone.
    patience: Duration,
}

impl Default for Pace {
    fn default() -> Self {
        Self {
            piece_bytes: Kind::SnapshotPiece.max_bytes(),
            pause: Duration::from_millis(5),
            patience: Duration::from_secs(10),
        }
    }
}

/// Snapshots on their way out of this node, to any peer. Clones share the quota.
#[derive(Clone)]
pub(crate) struct Outbound {
    turns: Arc<Semaphore>,
    pace: Pace,
}

impl Default for Outbound {
    fn default() -> Self {
        Self {
            turns: Arc::new(Semaphore::new(MAX_OUTBOUND)),
            pace: Pace::default(),
        }
    }
}

/// The one snapshot that is on its way to a peer; dropping it gives it up.
#[derive(Default)]
pub(crate) struct OnItsWay(Option<tokio::task::AbortHandle>);

impl Drop for OnItsWay {
    fn drop(&mut self) {
        if let Some(task) = &self.0 {
            task.abort();
        }
    }
}

impl OnItsWay {
    /// Sends another one in its place, and reports what became of that.
    pub(crate) fn replace<T: Send + 'static>(
        &mut self,
        outbound: &Outbound,
        link: Link,
        message: Message,
        (replica, peer): (ReplicaHandle<T>, NodeId),
    ) {
        let outbound = outbound.clone();
        let sending = tokio::spawn(async move {
            let sent = outbound.send(&link, message).await;
            let report = match sent {
                Some(()) => SnapshotReport::Delivered,
                None => SnapshotReport::Failed,
            };
            replica.report_snapshot(peer, report).await;
        });
        *self = Self(Some(sending.abort_handle()));
    }
}

impl Outbound {
    /// Sends a message with a snapshot; `None` if the peer did not take all of it.
    async fn send(&self, link: &Link, message: Message) -> Option<()> {
        let _turn = self.turns.acquire().await.ok()?;
        let mut stream = link.open_one_way().ok()?;
        stream.give_way();
        let message = wire::to_wire(message);
        let patience = self.pace.patience;
        if link.hello().takes_snapshot_pieces {
            self.in_pieces(&mut stream, message).await?;
        } else {
            // An older version takes it whole, however long that takes while the link lives.
            let whole = Frame::message(Kind::Raft, &message);
            timeout(6 * patience, stream.send(&whole))
                .await
                .ok()?
                .ok()?;
        }
        stream.finish();
        // Read to its end by the peer: `None`.
        let stopped = timeout(patience, stream.stopped()).await.ok()?;
        stopped.is_none().then_some(())
    }

    async fn in_pieces(&self, stream: &mut FrameSender, message: proto::Message) -> Option<()> {
        for (number, frame) in pieces(message, self.pace.piece_bytes).enumerate() {
            if number > 1 {
                tokio::time::sleep(self.pace.pause).await;
            }
            timeout(self.pace.patience, stream.send(&frame))
                .await
                .ok()?
                .ok()?;
        }
        Some(())
    }
}

/// The frames that a message with a snapshot becomes. Copies nothing of the state.
fn pieces(mut message: proto::Message, piece_bytes: usize) -> impl Iterator<Item = Frame> {
    let snapshot = message.snapshot.as_mut();
    let mut data = snapshot.map_or_else(Bytes::new, |snapshot| std::mem::take(&mut snapshot.data));
    let (bytes, crc32c) = (data.len() as u64, crc32c::crc32c(&data));
    let head = proto::SnapshotHead {
        message: Some(message),
        bytes,
    };
    let end = proto::SnapshotEnd { bytes, crc32c };
    let middle = std::iter::from_fn(move || {
        let piece = data.split_to(piece_bytes.min(data.len()));
        (!piece.is_empty()).then(|| Frame::new(Kind::SnapshotPiece, piece))
    });
    std::iter::once(Frame::message(Kind::SnapshotHead, &head))
        .chain(middle)
        .chain(std::iter::once_with(move || {
            Frame::message(Kind::SnapshotEnd, &end)
        }))
}

/// What this node holds of snapshots that are not whole: one at a time, the newest to begin.
#[derive(Clone)]
pub(crate) struct Inbound {
    begun: watch::Sender<u64>,
    patience: Duration,
}

impl Default for Inbound {
    fn default() -> Self {
        Self {
            begun: watch::Sender::new(0),
            patience: Pace::default().patience,
        }
    }
}

impl Inbound {
    /// Takes the rest of a snapshot whose head came. The stream is told to stop when it goes wrong.
    pub(crate) async fn receive(
        &self,
        stream: &mut FrameReceiver,
        head: &Frame,
    ) -> Result<proto::Message, Refused> {
        let mut newest = self.begun.subscribe();
        self.begun.send_modify(|begun| *begun += 1);
        newest.mark_unchanged();
        let ours = *self.begun.borrow();
        let overtaken = async {
            // The sender lives as long as `self`.
            let _ = newest.wait_for(|begun| *begun > ours).await;
        };
        let received = tokio::select! {
            received = self.collect(stream, head) => received,
            () = overtaken => Err(Refused::Overtaken),
        };
        if received.is_err() {
            stream.stop(Code::Protocol);
        }
        received
    }

    async fn collect(
        &self,
        stream: &mut FrameReceiver,
        head: &Frame,
    ) -> Result<proto::Message, Refused> {
        let mut partial = Partial::begin(head)?;
        loop {
            let frame = timeout(self.patience, stream.recv())
                .await
                .map_err(|_| Refused::Stalled)?
                .map_err(|error| Refused::Lost(error.to_string()))?
                .ok_or_else(|| Refused::Lost("the stream ended before the snapshot".into()))?;
            match frame.kind {
                Kind::SnapshotPiece => partial.take(&frame.payload)?,
                Kind::SnapshotEnd => return partial.end(&frame),
                other => return Err(Refused::Unexpected(other)),
            }
        }
    }
}

/// Why a snapshot in pieces was dropped. Raft sends another.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Refused {
    #[error("its {0:?} does not decode")]
    Malformed(Kind),
    #[error("{bytes} bytes are announced, at most {MAX_SNAPSHOT_BYTES} are taken")]
    TooLarge { bytes: u64 },
    #[error("more than the {announced} bytes came that were announced")]
    TooMuch { announced: usize },
    #[error("{found} bytes came, {announced} were announced")]
    TooShort { found: usize, announced: usize },
    #[error("its checksum is wrong")]
    Checksum,
    #[error("{0:?} in the middle of it")]
    Unexpected(Kind),
    #[error("it does not go on")]
    Stalled,
    #[error("a newer one begins")]
    Overtaken,
    #[error("{0}")]
    Lost(String),
}

/// A snapshot of which some pieces have come.
struct Partial {
    message: proto::Message,
    announced: usize,
    /// Grows with what comes, not with what was announced.
    data: BytesMut,
}

impl Partial {
    fn begin(head: &Frame) -> Result<Self, Refused> {
        let malformed = || Refused::Malformed(Kind::SnapshotHead);
        let proto::SnapshotHead { message, bytes } = head.decode().map_err(|_| malformed())?;
        let message = message.ok_or_else(malformed)?;
        let empty = message
            .snapshot
            .as_ref()
            .is_some_and(|held| held.data.is_empty());
        if !empty {
            return Err(malformed());
        }
        match usize::try_from(bytes) {
            Ok(announced) if announced <= MAX_SNAPSHOT_BYTES => Ok(Self {
                message,
                announced,
                data: BytesMut::new(),
            }),
            _ => Err(Refused::TooLarge { bytes }),
        }
    }

    fn take(&mut self, piece: &[u8]) -> Result<(), Refused> {
        let announced = self.announced;
        if piece.len() > announced - self.data.len() {
            return Err(Refused::TooMuch { announced });
        }
        if piece.is_empty() {
            // A stream of nothing would never end.
            return Err(Refused::Malformed(Kind::SnapshotPiece));
        }
        self.data.extend_from_slice(piece);
        Ok(())
    }

    fn end(mut self, end: &Frame) -> Result<proto::Message, Refused> {
        let malformed = |_| Refused::Malformed(Kind::SnapshotEnd);
        let proto::SnapshotEnd { bytes, crc32c } = end.decode().map_err(malformed)?;
        let (found, announced) = (self.data.len(), self.announced);
        if found != announced || bytes != announced as u64 {
            return Err(Refused::TooShort { found, announced });
        }
        if crc32c::crc32c(&self.data) != crc32c {
            return Err(Refused::Checksum);
        }
        if let Some(snapshot) = &mut self.message.snapshot {
            snapshot.data = self.data.freeze();
        }
        Ok(self.message)
    }
}

#[cfg(test)]
mod tests;
