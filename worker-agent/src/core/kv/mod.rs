//! What an engine's cache holds, exactly: by the events that it publishes of its blocks.
//!
//! [`Batch`] reads what it says, [`stream`] puts that in order and notices what is missing, [`blocks`] counts
//! copies and knows which chunks follow from them, [`align()`] finds a prompt's chunks in its tokens. [`Exact`]
//! is all of it for one engine.

mod align;
mod blocks;
mod chunks;
mod event;
mod exact;
mod found;
mod kept;
mod msgpack;
mod order;
#[cfg(test)]
mod order_tests;
mod promises;
mod seen;
mod stream;
#[cfg(test)]
mod stream_tests;
#[cfg(test)]
mod tests;
mod vocabulary;

pub use align::{Aligned, align};
pub use blocks::Placed;
pub use event::{Batch, Event, MAX_BATCH_BYTES, Place, Stored};
pub use exact::{Exact, News, Promise};
pub use kept::KeptExact;
pub use msgpack::Unreadable;
pub use order::Turn;
pub use promises::Ahead;
pub use seen::{Judged, Seen};
pub use stream::Counts;
pub use vocabulary::{MAX_TOKENIZER_BYTES, Vocabulary, VocabularyError};
