//! Reading a request's body: bounded in size, in time, and against the memory for all bodies.
#![allow(clippy::disallowed_methods)] // the rim: this is where time passes

use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use forebay_proto::Secret;
use http_body_util::BodyExt;
use hyper::body::{Body, Incoming};
use tokio::time::{Instant, timeout_at};

use crate::core::error::{ApiError, Code};
use crate::shared::{BodyBudget, Shared};

/// Longest wait for all of a body.
const WHOLE_TIMEOUT: Duration = Duration::from_secs(60);

/// A body and the memory it takes.
pub(crate) struct Read {
    pub(crate) text: Secret,
    held: Option<BodyBudget>,
}

impl Read {
    /// Gives text and memory back: it will not be sent again.
    pub(crate) fn forget(&mut self) {
        self.text = Secret::default();
        self.held = None;
    }
}

/// Why there is no body.
pub(crate) enum Unread {
    Refused(ApiError),
    /// It ended early; its client has most likely left.
    BrokeOff,
}

impl From<ApiError> for Unread {
    fn from(error: ApiError) -> Self {
        Self::Refused(error)
    }
}

impl Unread {
    pub(crate) fn error(self) -> ApiError {
        match self {
            Self::Refused(error) => error,
            Self::BrokeOff => broken(),
        }
    }
}

pub(crate) async fn read(shared: &Arc<Shared>, mut body: Incoming) -> Result<Read, Unread> {
    let limit = shared.settings.max_body_bytes;
    let mut budget = shared.hold_body();
    let hint = body.size_hint();
    if hint.lower() > limit {
        return Err(too_large(limit).into());
    }
    // What is announced is taken at once, so that bodies do not fail half way.
    let mut held = hint.lower();
    if !budget.take(held) {
        return Err(no_memory().into());
    }
    let mut text = BytesMut::new();
    let mut only: Option<Bytes> = None;
    let until = Instant::now() + WHOLE_TIMEOUT;
    loop {
        let soon = (Instant::now() + shared.settings.limits.body_pause).min(until);
        let frame = timeout_at(soon, body.frame()).await.map_err(|_| slow())?;
        let Some(frame) = frame else { break };
        let frame = frame.map_err(|_| Unread::BrokeOff)?;
        let Ok(piece) = frame.into_data() else {
            continue;
        };
        let size = (text.len() + only.as_ref().map_or(0, Bytes::len) + piece.len()) as u64;
        if size > limit {
            return Err(too_large(limit).into());
        }
        if size > held {
            if !budget.take(size - held) {
                return Err(no_memory().into());
            }
            held = size;
        }
        // A body in one piece is not copied.
        if only.is_none() && text.is_empty() {
            only = Some(piece);
            continue;
        }
        if let Some(first) = only.take() {
            text.reserve(usize::try_from(held).unwrap_or(0));
            text.extend_from_slice(&first);
        }
        text.extend_from_slice(&piece);
    }
    Ok(Read {
        text: Secret::new(only.unwrap_or_else(|| text.freeze())),
        held: Some(budget),
    })
}

fn too_large(limit: u64) -> ApiError {
    let message = format!("the body is larger than the {limit} bytes that are allowed");
    ApiError::new(Code::RequestTooLarge, message)
}

fn no_memory() -> ApiError {
    ApiError::new(
        Code::Overloaded,
        "too many large requests are under way: try again soon",
    )
}

fn slow() -> ApiError {
    ApiError::new(
        Code::RequestTimeout,
        "the body did not arrive in time: send it without pauses, within a minute",
    )
}

fn broken() -> ApiError {
    ApiError::new(Code::InvalidJson, "the body ended before it was complete")
}
