//! Every error that a client can see: one table, kept with `docs/api.md` by a test.

use std::borrow::Cow;
use std::time::Duration;

use serde_json::json;

/// What went wrong, as the `code` of an OpenAI error object.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Code {
    /// The request's head is not what HTTP asks for.
    BadRequest,
    /// The body is not JSON, or not an object with fields of the right types.
    InvalidJson,
    /// A key appears twice: the engine might read the other one.
    DuplicateKey,
    /// `model` is missing or not a string.
    ModelRequired,
    /// The API key is missing or unknown.
    InvalidApiKey,
    /// The key may not ask this model.
    ModelNotAllowed,
    /// Only a key with `debug` may ask why.
    DebugKeyRequired,
    /// The key has asked as much as it may.
    RateLimitExceeded,
    /// No worker has so large a context.
    ContextLengthExceeded,
    /// No worker in the facts serves the model.
    ModelNotFound,
    /// No such path.
    NotFound,
    /// The path exists, the method does not.
    MethodNotAllowed,
    /// The body did not arrive in time.
    RequestTimeout,
    /// The body is over the limit.
    RequestTooLarge,
    /// Engines died of this very request.
    Quarantined,
    /// A bounded queue or budget is full.
    Overloaded,
    /// No worker had room before the queue's deadline.
    QueueTimeout,
    /// Workers that serve the model exist, none can be reached.
    NoCapacity,
    /// This balancer is about to stop.
    Draining,
    /// The worker's drain came to its deadline in the middle of the answer.
    WorkerDrained,
    /// The worker failed, and so did the retries.
    UpstreamError,
    /// The worker's first byte, or the next one, did not come in time.
    UpstreamTimeout,
}

/// One row of the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Row {
    /// HTTP status.
    pub status: u16,
    /// The error object's `type`.
    pub kind: &'static str,
    /// The error object's `code`.
    pub code: &'static str,
    /// When to ask again, where asking again helps; in `retry-after` and `retry-after-ms`.
    pub retry_after: Option<Duration>,
    /// The connection is closed after the answer, because the request was not read to its end.
    pub close: bool,
    /// Value of `x-forebay-dropped-reason`, for requests that were shed.
    pub dropped: Option<&'static str>,
}

impl Code {
    /// Every code, for tables and tests.
    pub const ALL: [Self; 22] = [
        Self::BadRequest,
        Self::InvalidJson,
        Self::DuplicateKey,
        Self::ModelRequired,
        Self::InvalidApiKey,
        Self::ModelNotAllowed,
        Self::DebugKeyRequired,
        Self::RateLimitExceeded,
        Self::ContextLengthExceeded,
        Self::ModelNotFound,
        Self::NotFound,
        Self::MethodNotAllowed,
        Self::RequestTimeout,
        Self::RequestTooLarge,
        Self::Quarantined,
        Self::Overloaded,
        Self::QueueTimeout,
        Self::NoCapacity,
        Self::Draining,
        Self::WorkerDrained,
        Self::UpstreamError,
        Self::UpstreamTimeout,
    ];

    /// How it is answered.
    #[must_use]
    pub const fn row(self) -> Row {
        const INVALID: &str = "invalid_request_error";
        const fn row(status: u16, kind: &'static str, code: &'static str) -> Row {
            Row {
                status,
                kind,
                code,
                retry_after: None,
                close: false,
                dropped: None,
            }
        }
        const fn again(row: Row, seconds: u64) -> Row {
            Row {
                retry_after: Some(Duration::from_secs(seconds)),
                ..row
            }
        }
        const fn closing(row: Row) -> Row {
            Row { close: true, ..row }
        }
        const fn dropped(row: Row, reason: &'static str) -> Row {
            Row {
                dropped: Some(reason),
                ..row
            }
        }
        match self {
            Self::BadRequest => closing(row(400, INVALID, "bad_request")),
            Self::InvalidJson => row(400, INVALID, "invalid_json"),
            Self::DuplicateKey => row(400, INVALID, "duplicate_key"),
            Self::ModelRequired => row(400, INVALID, "model_required"),
            Self::InvalidApiKey => row(401, "authentication_error", "invalid_api_key"),
            Self::ModelNotAllowed => row(403, "permission_error", "model_not_allowed"),
            Self::DebugKeyRequired => row(403, "permission_error", "debug_key_required"),
            Self::RateLimitExceeded => {
                again(row(429, "rate_limit_error", "rate_limit_exceeded"), 1)
            }
            Self::ContextLengthExceeded => row(400, INVALID, "context_length_exceeded"),
            Self::ModelNotFound => row(404, INVALID, "model_not_found"),
            Self::NotFound => row(404, INVALID, "not_found"),
            Self::MethodNotAllowed => row(405, INVALID, "method_not_allowed"),
            Self::RequestTimeout => closing(row(408, INVALID, "request_timeout")),
            Self::RequestTooLarge => closing(row(413, INVALID, "request_too_large")),
            Self::Quarantined => row(422, INVALID, "quarantined"),
            Self::Overloaded => dropped(
                again(row(429, "rate_limit_error", "overloaded"), 1),
                "rejected-full",
            ),
            Self::QueueTimeout => dropped(
                again(row(429, "rate_limit_error", "queue_timeout"), 1),
                "rejected-queue-timeout",
            ),
            Self::NoCapacity => again(row(503, "overloaded_error", "no_capacity"), 2),
            Self::Draining => closing(again(row(503, "overloaded_error", "draining"), 1)),
            Self::WorkerDrained => again(row(503, "overloaded_error", "worker_drained"), 1),
            Self::UpstreamError => row(502, "api_error", "upstream_error"),
            Self::UpstreamTimeout => row(504, "api_error", "upstream_timeout"),
        }
    }
}

/// An error on its way to a client. Its message never quotes the request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ApiError {
    /// Its row of the table.
    pub code: Code,
    /// What happened and what to do.
    pub message: Cow<'static, str>,
    /// The field at fault, where there is one.
    pub param: Option<&'static str>,
    /// When to ask again, where that is known better than the table knows it.
    pub retry_after: Option<Duration>,
}

impl ApiError {
    /// An error that no single field is to blame for.
    #[must_use]
    pub fn new(code: Code, message: impl Into<Cow<'static, str>>) -> Self {
        Self {
            code,
            message: message.into(),
            param: None,
            retry_after: None,
        }
    }

    /// When asking again will help, at the earliest.
    #[must_use]
    pub const fn after(mut self, wait: Option<Duration>) -> Self {
        self.retry_after = wait;
        self
    }

    /// When to ask again, for the client; none: asking again does not help.
    #[must_use]
    pub fn ask_again(&self) -> Option<Duration> {
        let usual = self.code.row().retry_after?;
        Some(self.retry_after.unwrap_or(usual))
    }

    /// The field at fault.
    #[must_use]
    pub const fn about(mut self, param: &'static str) -> Self {
        self.param = Some(param);
        self
    }

    /// The OpenAI error object.
    #[must_use]
    pub fn object(&self) -> serde_json::Value {
        let row = self.code.row();
        json!({"error": {
            "message": self.message,
            "type": row.kind,
            "param": self.param,
            "code": row.code,
        }})
    }

    /// The object as an event of a stream that has begun. No `[DONE]` follows it.
    #[must_use]
    pub fn event(&self) -> String {
        format!("data: {}\n\n", self.object())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_are_distinct_and_types_follow_the_status() {
        for (i, code) in Code::ALL.into_iter().enumerate() {
            let row = code.row();
            let others = Code::ALL[..i].iter().map(|other| other.row().code);
            assert!(!others.clone().any(|other| other == row.code), "{code:?}");
            let kind = match row.status {
                401 => "authentication_error",
                403 => "permission_error",
                429 => "rate_limit_error",
                503 => "overloaded_error",
                502 | 504 => "api_error",
                _ => "invalid_request_error",
            };
            assert_eq!(row.kind, kind, "{code:?}");
            let asked_again = matches!(row.status, 429 | 503);
            assert_eq!(row.retry_after.is_some(), asked_again, "{code:?}");
        }
    }

    #[test]
    fn an_error_is_the_openai_object_and_its_event_ends_in_a_blank_line() {
        let error = ApiError::new(Code::ModelRequired, "name a model").about("model");
        assert_eq!(
            error.object().to_string(),
            r#"{"error":{"code":"model_required","message":"name a model","param":"model","type":"invalid_request_error"}}"#
        );
        assert!(error.event().starts_with("data: {\"error\":"));
        assert!(error.event().ends_with("}\n\n"));
    }

    /// The rows of the table in the manual, as `| status | code | type | retry |`.
    #[test]
    fn the_manual_has_this_table() {
        let manual = include_str!("../../../docs/api.md");
        for code in Code::ALL {
            let row = code.row();
            let retry = row
                .retry_after
                .map_or_else(|| "–".into(), |after| format!("{} s", after.as_secs()));
            let line = format!(
                "| {} | `{}` | `{}` | {retry} |",
                row.status, row.code, row.kind
            );
            assert!(manual.contains(&line), "docs/api.md lacks: {line}");
        }
        let rows = manual.lines().filter(|line| {
            line.strip_prefix("| ")
                .and_then(|rest| rest.split(' ').next())
                .is_some_and(|first| first.len() == 3 && first.parse::<u16>().is_ok())
        });
        assert_eq!(rows.count(), Code::ALL.len(), "docs/api.md has more rows");
    }
}
