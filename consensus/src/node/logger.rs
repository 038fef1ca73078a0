//! raft-rs logs through slog; this passes it on to `tracing`, one level quieter, without payloads.
//!
//! Below slog's `info` raft-rs prints whole messages and entries, so those levels are dropped before
//! anything is formatted. Key-value pairs are dropped too but for a few that hold numbers only.

use std::fmt::{self, Write as _};

use slog::{Drain, KV as _, Key, Level, Logger, Never, OwnedKVList, Record, Serializer};

/// A logger for one node; `id` stands in front of each line.
pub(crate) fn logger(id: u64) -> Logger {
    Logger::root(Bridge { id }, slog::o!())
}

struct Bridge {
    id: u64,
}

impl Drain for Bridge {
    type Ok = ();
    type Err = Never;

    fn log(&self, record: &Record<'_>, _values: &OwnedKVList) -> Result<(), Never> {
        let level = record.level();
        if !level.is_at_least(Level::Info) {
            return Ok(());
        }
        if level == Level::Info
            && !tracing::enabled!(target: "forebay::raft", tracing::Level::DEBUG)
        {
            return Ok(());
        }
        let mut line = Line(String::with_capacity(128));
        let _ = write!(line, "{}", record.msg());
        let _ = record.kv().serialize(record, &mut line);
        let (node, line) = (self.id, line.0);
        match level {
            Level::Critical | Level::Error => {
                tracing::error!(target: "forebay::raft", node, "{line}");
            }
            Level::Warning => tracing::warn!(target: "forebay::raft", node, "{line}"),
            Level::Info | Level::Debug | Level::Trace => {
                tracing::debug!(target: "forebay::raft", node, "{line}");
            }
        }
        Ok(())
    }
}

/// A line of bounded length.
struct Line(String);

const MAX_LINE: usize = 512;
const KEYS: [&str; 10] = [
    "term",
    "log_term",
    "log_index",
    "message_term",
    "msg term",
    "msg type",
    "from",
    "to",
    "index",
    "vote",
];

impl fmt::Write for Line {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        let room = MAX_LINE.saturating_sub(self.0.len());
        let cut = (0..=room.min(text.len()))
            .rev()
            .find(|&at| text.is_char_boundary(at));
        self.0.push_str(&text[..cut.unwrap_or(0)]);
        Ok(())
    }
}

impl Serializer for Line {
    fn emit_arguments(&mut self, key: Key, value: &fmt::Arguments<'_>) -> slog::Result {
        if KEYS.contains(&key) {
            let _ = write!(self, " {key}={value}");
        }
        Ok(())
    }
}
