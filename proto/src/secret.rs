//! Text that must not leave the request path.

use bytes::Bytes;

/// Prompt or completion text.
///
/// It has no `Debug`, `Display` or `Serialize`, so that it cannot slip into a log line, an error or
/// a document; whoever needs the bytes says so with [`Secret::expose`].
///
/// ```compile_fail
/// let secret = forebay_proto::Secret::new(bytes::Bytes::from_static(b"text"));
/// println!("{secret:?}");
/// ```
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Secret(Bytes);

impl Secret {
    /// Takes text in.
    #[must_use]
    pub const fn new(text: Bytes) -> Self {
        Self(text)
    }

    /// The text itself, for the next hop of the request path and nothing else.
    #[must_use]
    pub const fn expose(&self) -> &Bytes {
        &self.0
    }

    /// Its size in bytes.
    #[must_use]
    pub const fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there is none.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}
