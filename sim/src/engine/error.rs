//! Errors as vLLM words them: the OpenAI error object, with the status repeated as `code`.

use serde::Serialize;

/// An answer other than 200. The message never repeats what the client sent as text.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{status}: {message}")]
pub(super) struct ApiError {
    /// The HTTP status.
    pub(super) status: u16,
    /// What is wrong and what to do.
    pub(super) message: String,
    /// The field at fault.
    pub(super) param: Option<&'static str>,
}

impl ApiError {
    pub(super) fn bad(param: Option<&'static str>, message: impl Into<String>) -> ApiError {
        ApiError {
            status: 400,
            message: message.into(),
            param,
        }
    }

    pub(super) fn of(status: u16, message: impl Into<String>) -> ApiError {
        ApiError {
            status,
            message: message.into(),
            param: None,
        }
    }

    pub(super) fn busy() -> ApiError {
        ApiError::of(
            503,
            "The engine is currently busy and cannot accept new requests. Please try again later \
             or on a different instance.",
        )
    }

    pub(super) fn body(&self) -> Vec<u8> {
        #[derive(Serialize)]
        struct Outer<'a> {
            error: Inner<'a>,
        }
        #[derive(Serialize)]
        struct Inner<'a> {
            message: &'a str,
            r#type: &'a str,
            param: Option<&'a str>,
            code: u16,
        }
        let r#type = match self.status {
            404 => "NotFoundError",
            408 => "Request Timeout",
            413 => "Request Entity Too Large",
            503 => "Service Unavailable",
            _ => "BadRequestError",
        };
        let error = Inner {
            message: &self.message,
            r#type,
            param: self.param,
            code: self.status,
        };
        serde_json::to_vec(&Outer { error }).expect("strings and numbers serialise")
    }
}
