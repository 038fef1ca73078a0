//! Frames: what a stream is cut into. `length: u32 big-endian | kind: u8 | payload`.
//!
//! The length counts kind and payload. Each kind has a bound, checked before anything is buffered.

use std::collections::VecDeque;
use std::fmt;

use bytes::{Buf, BufMut, Bytes, BytesMut};
use prost::Message;

/// Bytes in front of a payload.
pub const HEADER_BYTES: usize = 5;

/// Payload of one piece of a body or an answer: larger ones are cut.
pub const MAX_TEXT_BYTES: usize = 256 << 10;

/// A payload up to here is copied out of what it was received in.
const ALONE_BYTES: usize = 4 << 10;

macro_rules! kinds {
    ($($(#[$doc:meta])* $name:ident = $number:literal, max $max:expr;)*) => {
        /// What a frame is.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[repr(u8)]
        pub enum Kind {
            $($(#[$doc])* $name = $number,)*
        }

        impl Kind {
            /// Every kind, for tables and tests.
            pub const ALL: &[Self] = &[$(Self::$name,)*];

            /// The kind with this number, if there is one.
            #[must_use]
            pub const fn from_number(number: u8) -> Option<Self> {
                match number {
                    $($number => Some(Self::$name),)*
                    _ => None,
                }
            }

            /// Largest payload in bytes.
            #[must_use]
            pub const fn max_bytes(self) -> usize {
                match self {
                    $(Self::$name => $max,)*
                }
            }
        }
    };
}

kinds! {
    /// First frame of a connection, both ways.
    Hello = 0x01, max 4 << 10;
    /// A control RPC.
    Request = 0x10, max 4 << 20;
    /// An answer to a control RPC.
    Response = 0x11, max 64 << 20;
    /// On a watch stream, consumer to node: the revision it has applied (8 bytes).
    Applied = 0x12, max 8;
    /// Raft messages between control nodes.
    Raft = 0x20, max 64 << 20;
    /// Begins a snapshot that comes in pieces.
    SnapshotHead = 0x21, max 64 << 10;
    /// A piece of a snapshot: bytes of the state.
    SnapshotPiece = 0x22, max 256 << 10;
    /// The snapshot is complete.
    SnapshotEnd = 0x23, max 64;
    /// Header of a placement.
    Place = 0x30, max 64 << 10;
    /// A piece of the request's body: text.
    Body = 0x31, max MAX_TEXT_BYTES;
    /// The body is complete.
    BodyEnd = 0x32, max 0;
    /// The agent took the placement.
    Accepted = 0x33, max 16 << 10;
    /// The agent did not take it.
    Refused = 0x34, max 16 << 10;
    /// Status and headers of the engine's answer.
    Head = 0x35, max 64 << 10;
    /// A piece of the engine's answer: text.
    Data = 0x36, max MAX_TEXT_BYTES;
    /// How the placement ended.
    Trailer = 0x37, max 16 << 10;
    /// Load of a worker, also sent as a datagram of its own.
    Load = 0x38, max 1 << 10;
    /// A balancer follows what is resident in a worker's cache.
    Follow = 0x39, max 1 << 10;
    /// A piece of all that is resident.
    ResidencySnapshot = 0x3a, max 256 << 10;
    /// What changed.
    ResidencyDelta = 0x3b, max 256 << 10;
    /// What would such a request meet? A datagram.
    Question = 0x3c, max 1_100;
    /// The answer to a question, a datagram.
    Quote = 0x3d, max 1 << 10;
}

/// One frame. Its payload may be text, so `Debug` shows its size only.
#[derive(Clone, PartialEq, Eq)]
pub struct Frame {
    /// What it is.
    pub kind: Kind,
    /// Its content.
    pub payload: Bytes,
}

impl Frame {
    /// A frame of these bytes.
    #[must_use]
    pub const fn new(kind: Kind, payload: Bytes) -> Self {
        Self { kind, payload }
    }

    /// A frame of this message.
    #[must_use]
    pub fn message(kind: Kind, message: &impl Message) -> Self {
        Self::new(kind, message.encode_to_vec().into())
    }

    /// Decodes the payload as a message.
    ///
    /// # Errors
    ///
    /// Returns [`FrameError::Malformed`] when it is not one.
    pub fn decode<M: Message + Default>(&self) -> Result<M, FrameError> {
        M::decode(self.payload.clone()).map_err(|_| FrameError::Malformed { kind: self.kind })
    }

    /// The five bytes in front of the payload.
    ///
    /// # Errors
    ///
    /// Returns [`FrameError::TooLarge`] when the payload exceeds its kind's bound.
    pub fn header(&self) -> Result<[u8; HEADER_BYTES], FrameError> {
        let (size, max) = (self.payload.len(), self.kind.max_bytes());
        if size > max {
            return Err(FrameError::TooLarge {
                kind: self.kind,
                size,
                max,
            });
        }
        let mut header = [0; HEADER_BYTES];
        let counted = u32::try_from(size + 1).expect("bounds are far below 4 GiB");
        (&mut header[..4]).put_u32(counted);
        header[4] = self.kind as u8;
        Ok(header)
    }
}

impl fmt::Debug for Frame {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}({} bytes)", self.kind, self.payload.len())
    }
}

/// What is wrong with a frame. The stream that carried it cannot go on.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// No such kind.
    #[error("unknown frame kind {number:#04x}")]
    UnknownKind {
        /// The number found.
        number: u8,
    },
    /// A length of zero: there is no kind.
    #[error("empty frame")]
    Empty,
    /// More than this kind may carry.
    #[error("{kind:?} frame of {size} bytes, at most {max} are allowed")]
    TooLarge {
        /// Its kind.
        kind: Kind,
        /// Payload bytes.
        size: usize,
        /// The bound.
        max: usize,
    },
    /// The payload is not the message that its kind promises.
    #[error("{kind:?} frame does not decode")]
    Malformed {
        /// Its kind.
        kind: Kind,
    },
}

/// Cuts a byte stream into frames.
///
/// A large frame that came within one piece is not copied, and of a body nothing is: its frames are handed out in as
/// many pieces as they came in, which says the same. Of any other kind it buffers no more than one frame of the
/// largest allowed size, and what was pushed beyond it.
#[derive(Default)]
pub struct Decoder {
    /// The beginning of a frame that came in several pieces.
    begun: BytesMut,
    /// Bytes of a body's frame that are to come.
    of_body: usize,
    /// What comes behind that, as it arrived: never empty while there is more.
    arrived: Bytes,
    more: VecDeque<Bytes>,
}

impl Decoder {
    /// Adds bytes as they arrived.
    pub fn push(&mut self, bytes: Bytes) {
        if self.arrived.is_empty() {
            self.arrived = bytes;
        } else if !bytes.is_empty() {
            self.more.push_back(bytes);
        }
    }

    /// The next whole frame, or piece of a body's, if it has arrived.
    ///
    /// # Errors
    ///
    /// Returns what is wrong with the frame; the decoder must not be used after that.
    pub fn pop(&mut self) -> Result<Option<Frame>, FrameError> {
        self.pop_at_most(usize::MAX)
    }

    /// As [`Decoder::pop`], with a tighter bound than the kind's own.
    ///
    /// # Errors
    ///
    /// As [`Decoder::pop`].
    pub fn pop_at_most(&mut self, bytes: usize) -> Result<Option<Frame>, FrameError> {
        if self.of_body > 0 {
            return Ok(self.piece());
        }
        if self.begun.is_empty() {
            if let Some((kind, size)) = header(&self.arrived, bytes)? {
                if self.arrived.len() >= HEADER_BYTES + size {
                    self.take(HEADER_BYTES);
                    let payload = self.take(size);
                    return Ok(Some(Frame::new(kind, alone(payload))));
                }
                if kind != Kind::Body {
                    self.begun
                        .reserve((HEADER_BYTES + size).min(MAX_TEXT_BYTES));
                }
            } else if self.arrived.is_empty() {
                return Ok(None);
            }
        }
        self.gather(HEADER_BYTES);
        let Some((kind, size)) = header(&self.begun, bytes)? else {
            return Ok(None);
        };
        if kind == Kind::Body && size > 0 {
            self.begun.clear();
            self.of_body = size;
            return Ok(self.piece());
        }
        self.gather(HEADER_BYTES + size);
        if self.begun.len() < HEADER_BYTES + size {
            return Ok(None);
        }
        let mut whole = std::mem::take(&mut self.begun);
        whole.advance(HEADER_BYTES);
        Ok(Some(Frame::new(kind, whole.freeze())))
    }

    /// What has arrived next of a body's frame.
    fn piece(&mut self) -> Option<Frame> {
        let size = self.arrived.len().min(self.of_body);
        self.of_body -= size;
        (size > 0).then(|| Frame::new(Kind::Body, self.take(size)))
    }

    /// Takes of what arrived until so much of a frame is there, or nothing is left.
    fn gather(&mut self, whole: usize) {
        while let missing @ 1.. = whole.saturating_sub(self.begun.len())
            && !self.arrived.is_empty()
        {
            let taken = self.take(missing.min(self.arrived.len()));
            self.begun.extend_from_slice(&taken);
        }
    }

    /// The first bytes of the first piece that arrived, which has as many.
    fn take(&mut self, bytes: usize) -> Bytes {
        let taken = self.arrived.split_to(bytes);
        if self.arrived.is_empty()
            && let Some(next) = self.more.pop_front()
        {
            self.arrived = next;
        }
        taken
    }

    /// Whether the stream may end here: no frame has been begun.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.begun.is_empty() && self.arrived.is_empty() && self.of_body == 0
    }
}

/// A small payload by itself: it is part of all that was received together, which would stay as long.
fn alone(payload: Bytes) -> Bytes {
    if payload.len() > ALONE_BYTES || payload.is_empty() {
        payload
    } else {
        Bytes::copy_from_slice(&payload)
    }
}

/// Kind and payload bytes of the frame that begins here, once its header is there.
fn header(bytes: &[u8], most: usize) -> Result<Option<(Kind, usize)>, FrameError> {
    let Some(([a, b, c, d, number], _)) = bytes.split_first_chunk::<HEADER_BYTES>() else {
        return Ok(None);
    };
    let counted = u32::from_be_bytes([*a, *b, *c, *d]) as usize;
    let size = counted.checked_sub(1).ok_or(FrameError::Empty)?;
    let kind = Kind::from_number(*number).ok_or(FrameError::UnknownKind { number: *number })?;
    let max = kind.max_bytes().min(most);
    if size > max {
        return Err(FrameError::TooLarge { kind, size, max });
    }
    Ok(Some((kind, size)))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn encode(frame: &Frame) -> Vec<u8> {
        let mut bytes = frame.header().unwrap().to_vec();
        bytes.extend_from_slice(&frame.payload);
        bytes
    }

    /// Adds a frame. Pieces of bodies that follow each other are one: how a body is cut says nothing.
    fn join(frames: &mut Vec<Frame>, next: Frame) {
        if let Some(last) = frames.last_mut()
            && last.kind == Kind::Body
            && next.kind == Kind::Body
        {
            last.payload = [&last.payload[..], &next.payload[..]].concat().into();
        } else {
            frames.push(next);
        }
    }

    fn frame() -> impl Strategy<Value = Frame> {
        (
            0..Kind::ALL.len(),
            proptest::collection::vec(any::<u8>(), 0..300),
        )
            .prop_map(|(kind, payload)| {
                let kind = Kind::ALL[kind];
                let size = payload.len().min(kind.max_bytes());
                Frame::new(kind, Bytes::copy_from_slice(&payload[..size]))
            })
    }

    proptest! {
        #[test]
        fn any_cut_of_a_stream_gives_the_same_frames(
            frames in proptest::collection::vec(frame(), 0..8),
            cuts in proptest::collection::vec(1..50usize, 1..40), twice: bool,
        ) {
            let mut together = twice;
            let stream: Vec<u8> = frames.iter().flat_map(encode).collect();
            let mut decoder = Decoder::default();
            let (mut found, mut rest, mut cuts) = (Vec::new(), &stream[..], cuts.iter().cycle());
            while !rest.is_empty() {
                let (piece, more) = rest.split_at((*cuts.next().unwrap()).min(rest.len()));
                decoder.push(Bytes::copy_from_slice(piece));
                rest = more;
                // Two pieces may have come at once.
                if together {
                    together = false;
                    continue;
                }
                together = twice;
                while let Some(frame) = decoder.pop().unwrap() {
                    join(&mut found, frame);
                }
            }
            while let Some(frame) = decoder.pop().unwrap() {
                join(&mut found, frame);
            }
            prop_assert!(decoder.is_empty());
            let mut expected = Vec::new();
            frames.into_iter().for_each(|frame| join(&mut expected, frame));
            prop_assert_eq!(found, expected);
        }

        #[test]
        fn garbage_never_panics_and_is_never_buffered_past_a_bound(
            garbage in proptest::collection::vec(any::<u8>(), 0..2000),
        ) {
            let mut decoder = Decoder::default();
            decoder.push(garbage.into());
            while let Ok(Some(frame)) = decoder.pop() {
                prop_assert!(frame.payload.len() <= frame.kind.max_bytes());
                let _ = frame.decode::<crate::wire::control::Request>();
            }
        }
    }

    #[test]
    fn a_frame_past_its_bound_is_refused_from_its_header_alone() {
        let mut decoder = Decoder::default();
        decoder.push(vec![0xff, 0xff, 0xff, 0xff, Kind::Place as u8].into());
        assert!(matches!(
            decoder.pop(),
            Err(FrameError::TooLarge {
                kind: Kind::Place,
                ..
            })
        ));
        let mut decoder = Decoder::default();
        decoder.push(vec![0, 0, 0, 11, Kind::Request as u8].into());
        assert_eq!(decoder.pop(), Ok(None), "ten bytes are to come");
        let tighter = decoder.pop_at_most(9);
        assert!(matches!(tighter, Err(FrameError::TooLarge { max: 9, .. })));
        let frame = Frame::new(Kind::BodyEnd, Bytes::from_static(b"x"));
        assert!(matches!(frame.header(), Err(FrameError::TooLarge { .. })));
    }

    #[test]
    fn of_a_body_nothing_is_waited_for_and_within_it_no_stream_ends() {
        let mut decoder = Decoder::default();
        let mut whole = encode(&Frame::new(Kind::Body, vec![7; 100].into()));
        whole.extend(encode(&Frame::new(Kind::BodyEnd, Bytes::new())));
        let whole = Bytes::from(whole);
        decoder.push(whole.slice(..60));
        let first = decoder.pop().unwrap().unwrap();
        assert_eq!((first.kind, first.payload.len()), (Kind::Body, 55));
        assert_eq!(decoder.pop(), Ok(None));
        assert!(!decoder.is_empty(), "45 bytes are to come");
        decoder.push(whole.slice(60..));
        let second = decoder.pop().unwrap().unwrap();
        assert_eq!((second.kind, second.payload.len()), (Kind::Body, 45));
        assert_eq!(second.payload.as_ptr(), whole[60..].as_ptr(), "not copied");
        assert_eq!(decoder.pop().unwrap().unwrap().kind, Kind::BodyEnd);
        assert!(decoder.is_empty());
    }

    #[test]
    fn debug_shows_no_content() {
        let frame = Frame::new(Kind::Body, Bytes::from_static(b"the secret"));
        assert_eq!(format!("{frame:?}"), "Body(10 bytes)");
    }
}
