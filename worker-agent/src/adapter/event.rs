//! What one event of a stream says of the stream.

/// Finish reasons of answers that are none: somebody else ended them, or the engine gave up.
pub(super) const FAILURES: [&[u8]; 2] = [b"abort", b"error"];

/// What an event says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Word {
    /// That it goes on.
    Nothing,
    /// Why it ends, which it does well.
    Ends,
    /// That it failed.
    Fails,
    /// `[DONE]`.
    Done,
}

/// Reads an event. Where the end is known already, no reason for it is looked for.
///
/// Inside a JSON string quotes are escaped, so that no text of an answer passes for a member.
pub(super) fn word(event: &[u8], ended: bool) -> Word {
    let line = event.trim_ascii();
    if line.starts_with(b"error:") || line.starts_with(b"event: error") {
        return Word::Fails;
    }
    let Some(data) = line.strip_prefix(b"data:") else {
        return Word::Nothing;
    };
    let data = data.trim_ascii_start();
    if data == b"[DONE]" {
        return Word::Done;
    }
    if is_error(data) {
        return Word::Fails;
    }
    if ended {
        return Word::Nothing;
    }
    finish_reason(data)
}

/// Whether the object begins with an error that is one.
fn is_error(data: &[u8]) -> bool {
    let inner = data.strip_prefix(b"{").map(<[u8]>::trim_ascii_start);
    let value = inner.and_then(|inner| value(inner, b"\"error\""));
    value.is_some_and(|value| !value.starts_with(b"null"))
}

fn finish_reason(data: &[u8]) -> Word {
    const KEY: &[u8] = b"\"finish_reason\"";
    let mut word = Word::Nothing;
    for at in memchr::memmem::find_iter(data, KEY) {
        let reason = value(&data[at..], KEY).and_then(|value| value.strip_prefix(b"\""));
        let Some(reason) = reason else { continue };
        let end = memchr::memchr(b'"', reason).unwrap_or(reason.len());
        if FAILURES.contains(&&reason[..end]) {
            return Word::Fails;
        }
        word = Word::Ends;
    }
    word
}

/// What stands behind a key and its colon.
pub(super) fn value<'a>(at: &'a [u8], key: &[u8]) -> Option<&'a [u8]> {
    let behind = at.strip_prefix(key)?.trim_ascii_start();
    Some(behind.strip_prefix(b":")?.trim_ascii_start())
}
