//! A GPU server as a model: continuous batching over a prefix cache, in exact virtual time.
//!
//! An iteration gives every request that decodes one token and spends what is left of the chunk budget
//! on prefills, those that run first and then those that wait, as far as the cache has blocks
//! (chunked prefill, as vLLM V1 and Sarathi do it). How long it takes is
//! [`forebay_scheduler::model::Profile`]'s. Iterations follow one another without a gap while there is
//! work, however late [`Engine::advance`] is called; what arrives during one is seen at its end.
//!
//! The cache holds blocks by the hash of everything up to their end; unused ones stay until others
//! need the room, least recently used first and a prompt's end before its beginning. Where none is
//! left, the newest request is pre-empted and computed again.

mod blocks;
mod engine;

pub use blocks::Blocks;
pub use engine::{Arrival, Change, Counts, Engine, Event, Settings};

#[cfg(test)]
mod tests;
