//! Sends a trace to anything that speaks the OpenAI API, and measures what its users would see.
//!
//! The load is open loop: each request has an intended start, the trace's own divided by the
//! speed, and is sent then whether or not earlier ones were answered. All latencies count from
//! that moment, so that a fleet that stalls the generator cannot hide it. A request is never sent
//! twice by us (the HTTP client replaces a kept connection that closed before anything was sent).
//!
//! [`Plan`] (what to send when), [`sse`], the judgement of answers and the report are pure;
//! [`run`] is the shell.

mod client;
mod plan;
mod reply;
mod report;
mod run;
pub mod sse;
mod words;

pub use plan::{Endpoint, Expected, Options, Plan, Planned};
pub use report::{ErrorCount, Lag, OneRequest, Percentiles, Report};
pub use run::{run, run_each};

use crate::trace::Trace;
use std::time::Duration;

/// What to send, where to, and how.
#[derive(Clone, Debug)]
pub struct Config {
    /// The requests.
    pub trace: Trace,
    /// Base URLs (`http://HOST:PORT`, one or more); requests take turns.
    pub targets: Vec<String>,
    /// How much faster than recorded.
    pub speed: f64,
    /// Send at most so many requests.
    pub limit: Option<usize>,
    /// The model to ask for; `None` takes the first that the first target lists.
    pub model: Option<String>,
    /// Sent as a bearer token.
    pub api_key: Option<ApiKey>,
    /// From sending a request to the end of its answer.
    pub timeout: Duration,
    /// Requests that may be unanswered at once; what is due beyond is an error and not sent.
    pub max_in_flight: usize,
    /// Spread arrivals inside the quantum of the trace's timestamps, by this seed.
    pub jitter: Option<u64>,
    /// What the requests are sent to.
    pub endpoint: Endpoint,
    /// Check the text of every answer, which has to come from the emulated engine.
    pub verify: bool,
}

impl Config {
    /// A replay of a whole trace at its own speed to one target.
    #[must_use]
    pub fn new(trace: Trace, target: String) -> Config {
        Config {
            trace,
            targets: vec![target],
            speed: 1.0,
            limit: None,
            model: None,
            api_key: None,
            timeout: Duration::from_secs(600),
            max_in_flight: 10_000,
            jitter: None,
            endpoint: Endpoint::Chat,
            verify: false,
        }
    }
}

/// A secret that does not print itself.
#[derive(Clone)]
pub struct ApiKey(pub String);

impl std::fmt::Debug for ApiKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("ApiKey(..)")
    }
}

/// How far a replay is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// Requests in all.
    pub total: u64,
    /// Requests that are over, errors included.
    pub done: u64,
    /// Requests that are sent and unanswered.
    pub in_flight: u64,
    /// Requests without a good answer.
    pub errors: u64,
    /// Since the first intended start.
    pub elapsed: Duration,
}

/// Why a replay does not start. Once it runs, errors are counted and do not end it.
#[derive(Debug, thiserror::Error)]
pub enum ReplayError {
    /// No target was given.
    #[error("no target: give at least one, as in http://127.0.0.1:8080")]
    NoTarget,
    /// A target is not a base URL.
    #[error("the target {0:?} is not of the form http://HOST:PORT")]
    Target(String),
    /// A target behind TLS, which is not spoken here.
    #[error(
        "the target {0:?} wants TLS, which a replay does not speak: give the plain http://HOST:PORT of a balancer, or of a proxy beside you that adds TLS"
    )]
    Tls(String),
    /// The speed makes no sense.
    #[error("the speed is {0}, but must be a number greater than 0")]
    Speed(f64),
    /// Nothing may be in flight.
    #[error("max_in_flight is 0: at least one request has to be allowed")]
    NoneInFlight,
    /// There is nothing to send.
    #[error("there are no requests to send: the trace is empty or the limit is 0")]
    NoRequests,
    /// The key cannot be put into a header.
    #[error("the API key has characters that a header cannot carry")]
    ApiKey,
    /// The model was not given and cannot be learnt.
    #[error("cannot learn the model from {target}/v1/models: {reason}; start it, or name a model")]
    Model {
        /// The first target.
        target: String,
        /// What went wrong.
        reason: String,
    },
}
