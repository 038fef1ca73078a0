//! The audit as a file: one record a line, and a last line that says where it ends.
//!
//! The state keeps the newest entries only ([`super::audit::KEPT_ENTRIES`]); files that are exported
//! before older ones go keep the rest, and each of them can be checked by itself: a record's hash is of
//! its content and of the record before it. What no file can say of itself is that it ended later once:
//! a file that was cut off and given a new end is told by the cluster's own head alone ([`Tail::check`]).

mod read;
mod tail;

use std::io::{self, Write};

use forebay_proto::wire::fleet as wire;
use forebay_proto::{ClusterId, Revision};
use serde::{Deserialize, Serialize};

pub use read::{Archive, ArchiveError, read};
pub use tail::{Joined, Tail};

use super::audit::hash;

/// One entry of the audit.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Record {
    /// Its place in the chain, from 1.
    pub number: u64,
    /// The log's index of what was asked.
    pub revision: Revision,
    /// Cell time at which the leader accepted it, in milliseconds since 1970.
    pub at_ms: u64,
    /// Who: an identity such as `operator/admin/alice`.
    pub actor: String,
    /// From where.
    pub address: String,
    /// What was asked, such as `set-desired`.
    pub action: String,
    /// Of what.
    pub target: String,
    /// Why, in the actor's words.
    pub reason: String,
    /// `done`, `unchanged`, or the refusal's name.
    pub result: String,
    /// Of the record before it, in hex.
    pub previous_hash: String,
    /// Of this one and so of all before it, in hex.
    pub hash: String,
}

/// Where an exported file ends.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct End {
    /// Of this form: 1.
    pub schema_version: u32,
    /// Whose audit it is.
    pub cluster_id: ClusterId,
    /// Number of the first record.
    pub first: u64,
    /// Number of the last one; less than `first`: there is none.
    pub last: u64,
    /// The last one's hash, in hex.
    pub head: String,
    /// Cell time of the export.
    pub exported_ms: u64,
}

/// The last line, told from records by its one key.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct EndLine {
    end: End,
}

/// What is wrong with a file, at the first place.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Fault {
    /// A record is not what it was.
    #[error("record {number} (line {line}) was changed: {problem}")]
    Changed {
        /// Which it should be.
        number: u64,
        /// Its line in the file, from 1; 0: told by the cluster.
        line: u64,
        /// How that shows.
        problem: &'static str,
    },
    /// Records are not there.
    #[error("record {from} is missing{}", until(*from, *to))]
    Missing {
        /// The first of them.
        from: u64,
        /// The last of them.
        to: u64,
    },
    /// A record does not belong there.
    #[error("the record on line {line}, which says that it is number {number}, was inserted")]
    Inserted {
        /// What it says of itself.
        number: u64,
        /// Its line in the file, from 1.
        line: u64,
    },
    /// The file stops without its end.
    #[error(
        "the file was cut off: record {number}, or the line that says where it ends, is missing"
    )]
    CutOff {
        /// The first that may be missing.
        number: u64,
    },
    /// The end does not fit the last record.
    #[error(
        "the end of the file (line {line}) does not fit record {number}: one of the two was changed"
    )]
    OtherEnd {
        /// The last record.
        number: u64,
        /// The end's line in the file, from 1.
        line: u64,
    },
    /// It is of another cell.
    #[error("it is the audit of cluster {file}, and this cluster is {ours}")]
    OtherCluster {
        /// The file's.
        file: ClusterId,
        /// The one that was asked.
        ours: ClusterId,
    },
    /// The file has more than the cluster.
    #[error(
        "record {number} is not in the cluster's audit, which ends before it: it was added, or the cluster began anew from a backup"
    )]
    Ahead {
        /// The first of them.
        number: u64,
    },
}

fn until(from: u64, to: u64) -> String {
    match to.saturating_sub(from) {
        0 => String::new(),
        more => format!(", and {more} after it"),
    }
}

impl Record {
    /// An entry as number `number` of its chain.
    #[must_use]
    pub fn of(number: u64, entry: &wire::AuditEntry) -> Self {
        let actor = entry.actor.clone().unwrap_or_default();
        Self {
            number,
            revision: Revision(entry.index),
            at_ms: entry.at_ms,
            actor: actor.identity,
            address: actor.address,
            action: entry.action.clone(),
            target: entry.target.clone(),
            reason: entry.reason.clone(),
            result: entry.result.clone(),
            previous_hash: hex(&entry.previous_hash),
            hash: hex(&entry.hash),
        }
    }

    /// The entry that it was made of; none where a hash is none.
    #[must_use]
    pub fn entry(&self) -> Option<wire::AuditEntry> {
        Some(wire::AuditEntry {
            index: self.revision.0,
            at_ms: self.at_ms,
            actor: Some(wire::Actor {
                identity: self.actor.clone(),
                address: self.address.clone(),
            }),
            action: self.action.clone(),
            target: self.target.clone(),
            reason: self.reason.clone(),
            result: self.result.clone(),
            previous_hash: unhex(&self.previous_hash)?.into(),
            hash: unhex(&self.hash)?.into(),
        })
    }

    fn content_hash(&self) -> Option<String> {
        Some(hex(&hash(&self.entry()?)))
    }

    /// Whether it is what its hash says.
    #[must_use]
    pub fn holds(&self) -> bool {
        self.content_hash().as_ref() == Some(&self.hash)
    }

    /// Its line in a file.
    #[must_use]
    pub fn line(&self) -> String {
        serde_json::to_string(self).expect("strings and numbers serialise")
    }
}

/// Writes records and where they end. An empty export says so, too.
///
/// # Errors
///
/// Returns what the disk says.
pub fn write(out: &mut impl Write, records: &[Record], end: &End) -> io::Result<()> {
    for record in records {
        writeln!(out, "{}", record.line())?;
    }
    let end = EndLine { end: end.clone() };
    let end = serde_json::to_string(&end).expect("strings and numbers serialise");
    writeln!(out, "{end}")
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn unhex(text: &str) -> Option<Vec<u8>> {
    let digits = text.as_bytes();
    let lower = |digit: &u8| digit.is_ascii_digit() || (b'a'..=b'f').contains(digit);
    if digits.len() != 64 || !digits.iter().all(lower) {
        return None;
    }
    let value = |digit: u8| {
        char::from(digit)
            .to_digit(16)
            .and_then(|v| u8::try_from(v).ok())
    };
    digits
        .chunks(2)
        .map(|pair| Some(value(pair[0])? << 4 | value(pair[1])?))
        .collect()
}

#[cfg(test)]
mod tests;
