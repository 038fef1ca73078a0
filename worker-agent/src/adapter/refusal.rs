//! Answers by which an engine says that it did not begin.

/// Why an engine did not begin: the request may run elsewhere, and costs no retry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum NotStarted {
    /// Its queue is full.
    Overloaded,
    /// It is about to end, and takes nothing more. Its `/health` may say otherwise.
    Stopping,
}

impl NotStarted {
    pub(crate) const ALL: [Self; 2] = [Self::Overloaded, Self::Stopping];

    /// Its name in metrics.
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Overloaded => "overloaded",
            Self::Stopping => "stopping",
        }
    }

    /// For an operator.
    pub(crate) const fn detail(self) -> &'static str {
        match self {
            Self::Overloaded => "the engine is overloaded (503)",
            Self::Stopping => "the engine is stopping and takes nothing more",
        }
    }
}

/// vLLM's, while it finishes what runs before it ends.
const STOPPING: &str = "cannot schedule new futures after shutdown";

/// What a status and the document behind it say; `None`: nothing of the kind.
pub(crate) fn not_started(status: u16, document: &[u8]) -> Option<NotStarted> {
    match status {
        503 => Some(NotStarted::Overloaded),
        // The message whole: one that quotes a request is none of these.
        500 if message(document).is_some_and(|said| said.trim() == STOPPING) => {
            Some(NotStarted::Stopping)
        }
        _ => None,
    }
}

/// An error's message: OpenAI's object, or SGLang's, which has it at the top.
fn message(document: &[u8]) -> Option<String> {
    #[derive(serde::Deserialize)]
    struct Document {
        #[serde(default)]
        error: Option<Inner>,
        #[serde(default)]
        message: Option<String>,
    }
    #[derive(serde::Deserialize)]
    struct Inner {
        message: String,
    }
    let document: Document = serde_json::from_slice(document).ok()?;
    let inner = document.error.map(|error| error.message);
    inner.or(document.message)
}

#[cfg(test)]
mod tests {
    use super::*;

    const OVERLOAD: &[u8] = include_bytes!("../../tests/samples/vllm-error-overload.json");
    const STOPPING: &[u8] = include_bytes!("../../tests/samples/vllm-error-stopping.json");
    const TOO_LONG: &[u8] = include_bytes!("../../tests/samples/vllm-error-toolong.json");

    #[test]
    fn what_was_not_begun_may_run_elsewhere() {
        assert_eq!(not_started(503, OVERLOAD), Some(NotStarted::Overloaded));
        assert_eq!(not_started(503, b""), Some(NotStarted::Overloaded));
        let sglang = include_bytes!("../../tests/samples/sglang-error-overload.json");
        assert_eq!(not_started(503, sglang), Some(NotStarted::Overloaded));
        assert_eq!(not_started(500, STOPPING), Some(NotStarted::Stopping));
        let flat = br#"{"object":"error","message":"cannot schedule new futures after shutdown"}"#;
        assert_eq!(not_started(500, flat), Some(NotStarted::Stopping));
    }

    #[test]
    fn any_other_error_may_have_begun() {
        assert_eq!(not_started(500, OVERLOAD), None);
        assert_eq!(not_started(400, TOO_LONG), None);
        assert_eq!(not_started(500, b"<html>"), None);
        assert_eq!(not_started(200, STOPPING), None);
        let quotes =
            br#"{"error":{"message":"no word 'cannot schedule new futures after shutdown'"}}"#;
        assert_eq!(not_started(500, quotes), None);
    }
}
