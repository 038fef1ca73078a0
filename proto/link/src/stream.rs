//! One direction of a QUIC stream, cut into frames.

use bytes::{Bytes, BytesMut};
use forebay_proto::frame::{Decoder, Frame, FrameError};

use crate::Code;

/// Why a frame could not be sent. The stream is over.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SendError {
    /// The peer does not read this stream any more; the number is its [`Code`].
    #[error("the peer stopped reading (code {0})")]
    Stopped(u64),
    /// The connection is gone.
    #[error("the connection is gone: {0}")]
    Lost(String),
    /// Too large for its kind.
    #[error(transparent)]
    Frame(#[from] FrameError),
}

/// Why no more frames will come. A clean end is not an error: `recv` returns `None`.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RecvError {
    /// The peer gave the stream up; the number is its [`Code`].
    #[error("the peer reset the stream (code {0})")]
    Reset(u64),
    /// The connection is gone.
    #[error("the connection is gone: {0}")]
    Lost(String),
    /// The stream ended inside a frame.
    #[error("the stream ended inside a frame")]
    Truncated,
    /// What came is not a frame.
    #[error(transparent)]
    Frame(#[from] FrameError),
}

/// Sends frames. Dropped without [`FrameSender::finish`] it resets the stream, so that a sender
/// that died cannot look like a clean end.
pub struct FrameSender {
    stream: quinn::SendStream,
    over: bool,
}

impl FrameSender {
    pub(crate) const fn new(stream: quinn::SendStream) -> Self {
        Self {
            stream,
            over: false,
        }
    }

    /// Sends one frame; waits while the peer's window is full.
    ///
    /// # Errors
    ///
    /// Returns why the stream is over.
    pub async fn send(&mut self, frame: &Frame) -> Result<(), SendError> {
        self.send_all(std::slice::from_ref(frame)).await
    }

    /// Sends frames behind each other, so that they travel together; waits while the peer's window is full.
    ///
    /// # Errors
    ///
    /// Returns why the stream is over.
    pub async fn send_all(&mut self, frames: &[Frame]) -> Result<(), SendError> {
        let mut pieces = pieces(frames)?;
        self.stream
            .write_all_chunks(&mut pieces)
            .await
            .map_err(|error| match error {
                quinn::WriteError::Stopped(code) => SendError::Stopped(code.into_inner()),
                other => SendError::Lost(other.to_string()),
            })
    }

    /// Sends after all other streams of this connection that have something to send.
    pub fn give_way(&self) {
        // Already stopped or lost: nothing is sent any more.
        let _ = self.stream.set_priority(-1);
    }

    /// Ends the stream cleanly: all that was sent will arrive unless the connection dies.
    pub fn finish(&mut self) {
        self.over = true;
        // Already stopped or lost: the peer knows, and nobody is left to tell.
        let _ = self.stream.finish();
    }

    /// Gives the stream up.
    pub fn reset(&mut self, code: Code) {
        self.over = true;
        // As above.
        let _ = self.stream.reset(code.var());
    }

    /// Waits until the peer stops reading (its code), or has read everything (`None`).
    pub fn stopped(&self) -> impl Future<Output = Option<u64>> + Send + 'static {
        let stopped = self.stream.stopped();
        async move {
            match stopped.await {
                Ok(code) => code.map(quinn::VarInt::into_inner),
                Err(_) => Some(u64::from(Code::Cancelled as u32)),
            }
        }
    }
}

impl Drop for FrameSender {
    fn drop(&mut self) {
        if !self.over {
            self.reset(Code::Cancelled);
        }
    }
}

/// Frames as they are written: small ones in one piece, the payload of a large one as it is.
fn pieces(frames: &[Frame]) -> Result<Vec<Bytes>, FrameError> {
    let mut pieces = Vec::with_capacity(2);
    let mut small = BytesMut::new();
    for frame in frames {
        small.extend_from_slice(&frame.header()?);
        if frame.payload.len() <= COPIED_BYTES {
            small.extend_from_slice(&frame.payload);
        } else {
            pieces.push(small.split().freeze());
            pieces.push(frame.payload.clone());
        }
    }
    if !small.is_empty() {
        pieces.push(small.freeze());
    }
    Ok(pieces)
}

/// Receives frames. Dropped before the end it tells the peer to stop.
pub struct FrameReceiver {
    stream: quinn::RecvStream,
    decoder: Decoder,
}

/// A payload up to here is copied behind its header, which takes less than a piece of its own, and keeps no
/// larger buffer that it is part of.
const COPIED_BYTES: usize = 4 << 10;
/// Pieces taken from the stream at once; each came in one packet.
const READ_PIECES: usize = 16;

impl FrameReceiver {
    pub(crate) fn new(stream: quinn::RecvStream) -> Self {
        Self {
            stream,
            decoder: Decoder::default(),
        }
    }

    /// The next frame, or `None` at the clean end. A body's frames come in pieces of any size. Cancel safe.
    ///
    /// # Errors
    ///
    /// Returns why the stream is over.
    pub async fn recv(&mut self) -> Result<Option<Frame>, RecvError> {
        self.recv_at_most(usize::MAX).await
    }

    /// As [`FrameReceiver::recv`], with a tighter bound on the payload than its kind's own.
    ///
    /// # Errors
    ///
    /// As [`FrameReceiver::recv`].
    pub async fn recv_at_most(&mut self, bytes: usize) -> Result<Option<Frame>, RecvError> {
        loop {
            if let Some(frame) = self.decoder.pop_at_most(bytes)? {
                return Ok(Some(frame));
            }
            let mut pieces = [const { Bytes::new() }; READ_PIECES];
            let read = self.stream.read_chunks(&mut pieces).await;
            let read = read.map_err(|error| match error {
                quinn::ReadError::Reset(code) => RecvError::Reset(code.into_inner()),
                other => RecvError::Lost(other.to_string()),
            })?;
            match read {
                Some(read) => pieces
                    .into_iter()
                    .take(read)
                    .for_each(|piece| self.decoder.push(piece)),
                None if self.decoder.is_empty() => return Ok(None),
                None => return Err(RecvError::Truncated),
            }
        }
    }

    /// Tells the peer that nothing more will be read.
    pub fn stop(&mut self, code: Code) {
        // Already ended or lost: nothing to stop.
        let _ = self.stream.stop(code.var());
    }
}
