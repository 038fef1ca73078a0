//! An emulated inference engine behind the OpenAI API.
//!
//! To whoever calls it, it is a vLLM that serves one or more models at a given pace: chat and text
//! completions, streaming or not, the model list, health, metrics by vLLM's names, errors as vLLM
//! words them, and an abort when the client goes away. What it says is [`text`]: made of nothing
//! but the prompt, so that any relay in front of it can be checked. When it says it is [`pace`].
//!
//! It does not tokenize (four bytes are a token), holds no KV cache, and stops only at the
//! requested length. [`serve`] is the shell; the rest is pure.

mod answer;
mod error;
mod metrics;
pub mod pace;
mod request;
mod server;
mod service;
pub mod text;

pub use server::serve;

use std::net::SocketAddr;

/// What to serve, where, and how fast.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    /// Where to listen; port 0 takes a free one.
    pub listen: SocketAddr,
    /// Names under which the model is served; the first is the default.
    pub models: Vec<String>,
    /// Requests that run at once.
    pub slots: usize,
    /// Requests that wait beyond them; more are refused with 503.
    pub queue: usize,
    /// Milliseconds to the first token of an empty prompt.
    pub ttft_ms: f64,
    /// Prompt tokens prefilled in a second, by each request on its own.
    pub prefill_tokens_per_s: f64,
    /// Milliseconds from token to token.
    pub tpot_ms: f64,
    /// Divides all times: 10 is ten times as fast.
    pub speed: f64,
    /// Prompt and answer together may have so many tokens.
    pub max_context_tokens: u64,
}

impl Default for Config {
    fn default() -> Config {
        Config {
            listen: SocketAddr::from(([127, 0, 0, 1], 0)),
            models: vec!["emulated".to_owned()],
            slots: 64,
            queue: 256,
            ttft_ms: 20.0,
            prefill_tokens_per_s: 10_000.0,
            tpot_ms: 20.0,
            speed: 1.0,
            max_context_tokens: 1 << 20,
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
        for (setting, value) in [("ttft_ms", self.ttft_ms), ("tpot_ms", self.tpot_ms)] {
            if !(0.0..=MAX_MS).contains(&value) {
                return bad(setting, value.to_string(), "from 0 to 3600000");
            }
        }
        for (setting, value) in [
            ("prefill_tokens_per_s", self.prefill_tokens_per_s),
            ("speed", self.speed),
        ] {
            if !(value.is_finite() && value > 0.0) {
                return bad(setting, value.to_string(), "greater than 0");
            }
        }
        if self.max_context_tokens < 2 {
            return bad(
                "max_context_tokens",
                self.max_context_tokens.to_string(),
                "at least 2",
            );
        }
        Ok(())
    }

    fn pace(&self) -> pace::Pace {
        let ms = |ms: f64| std::time::Duration::from_secs_f64(ms / 1000.0);
        pace::Pace {
            ttft: ms(self.ttft_ms),
            prefill_tokens_per_s: self.prefill_tokens_per_s,
            tpot: ms(self.tpot_ms),
            speed: self.speed,
        }
    }
}

const MAX_SLOTS: usize = 100_000;
const MAX_MS: f64 = 3_600_000.0;

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
            (|c| c.ttft_ms = f64::NAN, "ttft_ms"),
            (|c| c.tpot_ms = -1.0, "tpot_ms"),
            (|c| c.speed = 0.0, "speed"),
            (
                |c| c.prefill_tokens_per_s = f64::INFINITY,
                "prefill_tokens_per_s",
            ),
            (|c| c.max_context_tokens = 1, "max_context_tokens"),
        ] {
            assert!(check(change).unwrap_err().starts_with(setting));
        }
    }
}
