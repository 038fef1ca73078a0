//! An emulated inference engine behind the OpenAI API.
//!
//! To whoever calls it, it is a vLLM that serves one or more models at a given pace: chat and text
//! completions, streaming or not, the model list, health, metrics by vLLM's names, errors as vLLM
//! words them, and an abort when the client goes away. What it says is [`text`]: made of nothing
//! but the prompt, so that any relay in front of it can be checked. When it says it, and what its
//! cache holds, is [`crate::model`].
//!
//! It does not tokenize (four bytes are a token) and stops only at the requested length. [`serve`]
//! is the shell; the rest is pure.

#[cfg(test)]
mod against_model;
mod answer;
mod error;
mod events;
mod metrics;
mod publisher;
mod request;
mod server;
mod service;
pub mod text;

pub use server::serve;

use crate::model::Settings;
use forebay_scheduler::model::Profile;
use std::net::SocketAddr;

/// What to serve, where, and how fast.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    /// Where to listen; port 0 takes a free one.
    pub listen: SocketAddr,
    /// Names under which the model is served; the first is the default.
    pub models: Vec<String>,
    /// Requests that run at once (vLLM's `--max-num-seqs`).
    pub slots: usize,
    /// Requests that wait beyond them; more are refused with 503.
    pub queue: usize,
    /// How long an iteration takes.
    pub profile: Profile,
    /// Tokens that the cache holds.
    pub kv_tokens: u64,
    /// Tokens of one block of it.
    pub block_tokens: u32,
    /// Divides all times: 10 is ten times as fast.
    pub speed: f64,
    /// Prompt and answer together may have so many tokens.
    pub max_context_tokens: u64,
    /// Where the cache's events are published, as vLLM publishes them.
    pub kv_events: Option<KvEvents>,
    /// It dies of a request with `seed`, once its prompt is prefilled.
    pub dies_of_seed: bool,
}

/// Sockets of the cache's events, as ZeroMQ writes them; the engine listens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KvEvents {
    /// Where they are published.
    pub endpoint: String,
    /// Where they are told again.
    pub replay: Option<String>,
    /// Batches that can be told again.
    pub buffer: usize,
}

impl Default for Config {
    fn default() -> Config {
        Config {
            listen: SocketAddr::from(([127, 0, 0, 1], 0)),
            models: vec!["emulated".to_owned()],
            slots: 256,
            queue: 4_096,
            profile: Profile::default(),
            kv_tokens: 3_000_000,
            block_tokens: 16,
            speed: 1.0,
            max_context_tokens: 1 << 20,
            kv_events: None,
            dies_of_seed: false,
        }
    }
}

/// Why the engine does not serve.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// The address cannot be listened on.
    #[error(
        "cannot listen on {address}: {source}; stop what listens there, or give the engine another address"
    )]
    Listen {
        /// The address.
        address: SocketAddr,
        /// What the system said.
        source: std::io::Error,
    },
    /// A socket of the cache's events cannot be listened on.
    #[error("cannot publish the cache's events on {endpoint}: {problem}")]
    Events {
        /// The socket.
        endpoint: String,
        /// What was said.
        problem: String,
    },
    /// It died of a request, as it was told to.
    #[error("it died of a request with `seed`, as it was told to")]
    Died,
    /// A setting makes no sense.
    #[error("{setting} is {value}, but must be {must}")]
    Setting {
        /// The field of [`Config`].
        setting: &'static str,
        /// What it is.
        value: String,
        /// What it must be.
        must: &'static str,
    },
}

impl Config {
    /// Checks the settings.
    ///
    /// # Errors
    ///
    /// Names the first setting that makes no sense.
    pub fn check(&self) -> Result<(), EngineError> {
        let bad = |setting, value: String, must| {
            Err(EngineError::Setting {
                setting,
                value,
                must,
            })
        };
        if self.models.is_empty() || self.models.iter().any(String::is_empty) {
            return bad(
                "models",
                format!("{:?}", self.models),
                "one name or more, none empty",
            );
        }
        if !(1..=MAX_SLOTS).contains(&self.slots) {
            return bad("slots", self.slots.to_string(), "from 1 to 100000");
        }
        if self.queue > MAX_SLOTS {
            return bad("queue", self.queue.to_string(), "at most 100000");
        }
        if !(self.speed.is_finite() && self.speed > 0.0) {
            return bad("speed", self.speed.to_string(), "greater than 0");
        }
        if !(1..=MAX_BLOCK_TOKENS).contains(&self.block_tokens) {
            return bad(
                "block_tokens",
                self.block_tokens.to_string(),
                "from 1 to 4096",
            );
        }
        let blocks = self.kv_tokens / u64::from(self.block_tokens);
        if !(1..=MAX_BLOCKS).contains(&blocks) {
            return bad(
                "kv_tokens",
                self.kv_tokens.to_string(),
                "at least one block, and at most 16 million of them",
            );
        }
        if self.max_context_tokens < 2 {
            return bad(
                "max_context_tokens",
                self.max_context_tokens.to_string(),
                "at least 2",
            );
        }
        if let Some(KvEvents { buffer: 0, .. }) = self.kv_events {
            return bad("kv_events.buffer", "0".to_owned(), "at least 1");
        }
        Ok(())
    }

    fn settings(&self) -> Settings {
        Settings {
            profile: self.profile.at_speed(self.speed),
            kv_tokens: self.kv_tokens,
            block_tokens: self.block_tokens,
            max_seqs: self.slots,
            queue: self.queue,
        }
    }
}

const MAX_SLOTS: usize = 100_000;
const MAX_BLOCK_TOKENS: u32 = 4_096;
const MAX_BLOCKS: u64 = 16 << 20;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_setting_that_makes_no_sense_is_named() {
        let check = |change: fn(&mut Config)| {
            let mut config = Config::default();
            change(&mut config);
            config.check().map_err(|error| error.to_string())
        };
        assert_eq!(check(|_| {}), Ok(()));
        for (change, setting) in [
            ((|c| c.models.clear()) as fn(&mut Config), "models"),
            (|c| c.slots = 0, "slots"),
            (|c| c.queue = 1 << 40, "queue"),
            (|c| c.speed = 0.0, "speed"),
            (|c| c.speed = f64::NAN, "speed"),
            (|c| c.block_tokens = 0, "block_tokens"),
            (|c| c.kv_tokens = 15, "kv_tokens"),
            (|c| c.max_context_tokens = 1, "max_context_tokens"),
        ] {
            assert!(check(change).unwrap_err().starts_with(setting));
        }
    }
}
