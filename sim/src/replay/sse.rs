//! Splits a stream of server-sent events, however the bytes are cut, in bounded memory.
//!
//! Of an event only its data is kept: the data lines joined by newlines. Comments and other
//! fields are dropped, as is an event that the stream does not finish.

/// The stream is not what it claims to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SseError {
    /// A line, or an event of many lines, is too long.
    #[error("an event is longer than {MAX_EVENT_BYTES} bytes")]
    TooLong,
}

/// The longest line, and the longest event, in bytes.
pub const MAX_EVENT_BYTES: usize = 1 << 20;

/// The state between two pieces of a stream.
#[derive(Default)]
pub struct Splitter {
    line: Vec<u8>,
    data: Vec<u8>,
    has_data: bool,
    /// A carriage return ended the last line: a newline right after it belongs to it.
    after_cr: bool,
}

impl Splitter {
    /// Takes the next bytes and calls `on_event` with the data of each event that they complete.
    ///
    /// # Errors
    ///
    /// A line or an event is too long; nothing more can be read from this stream.
    pub fn push(&mut self, bytes: &[u8], mut on_event: impl FnMut(&[u8])) -> Result<(), SseError> {
        let mut rest = bytes;
        if self.after_cr && !rest.is_empty() {
            self.after_cr = false;
            rest = rest.strip_prefix(b"\n").unwrap_or(rest);
        }
        while let Some(end) = rest.iter().position(|byte| matches!(byte, b'\n' | b'\r')) {
            self.extend_line(&rest[..end])?;
            let cr = rest[end] == b'\r';
            rest = &rest[end + 1..];
            if cr {
                match rest.first() {
                    Some(b'\n') => rest = &rest[1..],
                    Some(_) => {}
                    None => self.after_cr = true,
                }
            }
            self.end_line(&mut on_event)?;
        }
        self.extend_line(rest)
    }

    fn extend_line(&mut self, bytes: &[u8]) -> Result<(), SseError> {
        if self.line.len() + bytes.len() > MAX_EVENT_BYTES {
            return Err(SseError::TooLong);
        }
        self.line.extend_from_slice(bytes);
        Ok(())
    }

    fn end_line(&mut self, on_event: &mut impl FnMut(&[u8])) -> Result<(), SseError> {
        if self.line.is_empty() {
            if self.has_data {
                on_event(&self.data);
            }
            self.data.clear();
            self.has_data = false;
        } else if let Some(value) = data_of(&self.line) {
            if self.data.len() + value.len() >= MAX_EVENT_BYTES {
                return Err(SseError::TooLong);
            }
            if self.has_data {
                self.data.push(b'\n');
            }
            self.data.extend_from_slice(value);
            self.has_data = true;
        }
        self.line.clear();
        Ok(())
    }
}

fn data_of(line: &[u8]) -> Option<&[u8]> {
    let value = line.strip_prefix(b"data")?;
    match value.first() {
        None => Some(value),
        Some(b':') => Some(value[1..].strip_prefix(b" ").unwrap_or(&value[1..])),
        Some(_) => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn events(pieces: &[&[u8]]) -> Result<Vec<String>, SseError> {
        let mut splitter = Splitter::default();
        let mut events = Vec::new();
        for piece in pieces {
            splitter.push(piece, |data| {
                events.push(String::from_utf8_lossy(data).into_owned());
            })?;
        }
        Ok(events)
    }

    #[track_caller]
    fn check(stream: &str, expected: &[&str]) {
        assert_eq!(events(&[stream.as_bytes()]).unwrap(), expected);
    }

    #[test]
    fn events_are_what_the_standard_says() {
        check("data: a\n\ndata: b\n\n", &["a", "b"]);
        check("data:a\r\n\r\ndata:  b\r\rdata: c\n\n", &["a", " b", "c"]);
        check("data: a\ndata: b\n\n", &["a\nb"]);
        check(": ping\n\nevent: x\nid: 1\ndata: a\nretry: 5\n\n", &["a"]);
        check("data\n\ndatum: a\n\ndata: \n\n", &["", ""]);
        check("\n\n\ndata: a\n", &[]);
    }

    #[test]
    fn a_line_or_event_without_end_is_refused() {
        let long = vec![b'x'; MAX_EVENT_BYTES + 1];
        assert_eq!(events(&[&long]), Err(SseError::TooLong));
        let half = [b"data:", &long[..MAX_EVENT_BYTES / 2], b"\n"].concat();
        assert_eq!(events(&[&half, &half, &half]), Err(SseError::TooLong));
    }

    proptest! {
        #[test]
        fn any_cutting_gives_the_same_events(
            stream in "(data: ?|data|: |event:|[a-c]|é|\n|\r\n|\r|\n\n){0,60}",
            cuts in proptest::collection::vec(0_usize..5, 0..200),
        ) {
            let mut pieces = Vec::new();
            let mut rest = stream.as_bytes();
            for cut in cuts {
                let (piece, tail) = rest.split_at(cut.min(rest.len()));
                pieces.push(piece);
                rest = tail;
            }
            pieces.push(rest);
            prop_assert_eq!(events(&pieces), events(&[stream.as_bytes()]));
        }

        #[test]
        fn no_bytes_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let _ = events(&[&bytes]);
        }
    }
}
