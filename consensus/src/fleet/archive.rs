//! The audit as a file: one record a line, and a last line that says where it ends.
//!
//! The state keeps the newest entries only ([`super::audit::KEPT_ENTRIES`]); files that are exported
//! before older ones go keep the rest, and each of them can be checked by itself: a record's hash is of
//! its content and of the record before it. What no file can say of itself is that it ended later once:
//! a file that was cut off and given a new end is told by the cluster's own head alone ([`Tail::check`]).

use std::io::{self, BufRead, Write};

use forebay_proto::wire::fleet as wire;
use forebay_proto::{ClusterId, Millis, Revision};
use serde::{Deserialize, Serialize};

use super::audit::{GENESIS, KEPT_ENTRIES, hash};

/// Longest line that is read, in bytes: the texts of an entry are cut far below.
pub const MAX_LINE_BYTES: u64 = 32 << 10;

/// Stands for a place that is in no file: the cluster's own answer.
const NO_LINE: u64 = 0;

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

/// What a file is found to hold.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Archive {
    /// Where it ends.
    pub end: End,
    /// Its last records, as many as a cluster keeps.
    pub newest: Vec<Record>,
}

/// A file cannot be read to its end, or it is not whole.
#[derive(Debug, thiserror::Error)]
pub enum ArchiveError {
    /// The disk.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// The content.
    #[error(transparent)]
    Fault(#[from] Fault),
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

    fn content_hash(&self) -> Option<String> {
        let entry = wire::AuditEntry {
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
            hash: bytes::Bytes::new(),
        };
        Some(hex(&hash(&entry)))
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

/// Reads a file and checks each record, each link and the end. `seen` gets each line that holds.
///
/// # Errors
///
/// Returns the first place that does not hold, or what the disk says.
pub fn read(
    file: impl BufRead,
    mut seen: impl FnMut(&Record) -> io::Result<()>,
) -> Result<Archive, ArchiveError> {
    let mut lines = Lines { file, line: 0 };
    let mut reader = Reader::default();
    while let Some(line) = lines.read()? {
        let at = lines.line;
        let parsed = Line::of(&line);
        let fault = match &parsed {
            Line::Record(record) => match reader.take(record) {
                Ok(()) => {
                    seen(record)?;
                    continue;
                }
                Err(broken) => {
                    let next = lines.read()?.map(|line| Line::of(&line));
                    reader.diagnose(broken, record, at, next.as_ref())
                }
            },
            Line::End(end) => match reader.ends(end, at) {
                Ok(()) if lines.read()?.is_none() => {
                    return Ok(Archive {
                        end: end.clone(),
                        newest: reader.newest.into(),
                    });
                }
                Ok(()) => Fault::Inserted {
                    number: end.last + 1,
                    line: at + 1,
                },
                Err(fault) => fault,
            },
            Line::Neither => Fault::Changed {
                number: reader.next_number(),
                line: at,
                problem: "it is not a record as exports write them",
            },
        };
        return Err(fault.into());
    }
    let number = reader.next_number();
    Err(Fault::CutOff { number }.into())
}

struct Lines<R> {
    file: R,
    line: u64,
}

impl<R: BufRead> Lines<R> {
    fn read(&mut self) -> io::Result<Option<Vec<u8>>> {
        let mut line = Vec::new();
        let mut bounded = io::Read::take(&mut self.file, MAX_LINE_BYTES);
        if bounded.read_until(b'\n', &mut line)? == 0 {
            return Ok(None);
        }
        self.line += 1;
        Ok(Some(line))
    }
}

enum Line {
    Record(Record),
    End(End),
    Neither,
}

impl Line {
    /// What a line is, to the last byte.
    fn of(line: &[u8]) -> Self {
        let Some(line) = line.strip_suffix(b"\n") else {
            return Self::Neither;
        };
        if let Ok(record) = serde_json::from_slice::<Record>(line)
            && record.line().as_bytes() == line
        {
            return Self::Record(record);
        }
        match serde_json::from_slice::<EndLine>(line) {
            Ok(end)
                if serde_json::to_vec(&end).is_ok_and(|again| again == line)
                    && end.end.schema_version == 1 =>
            {
                Self::End(end.end)
            }
            Ok(_) | Err(_) => Self::Neither,
        }
    }

    /// The hash that it says it follows.
    fn follows(&self) -> Option<&str> {
        match self {
            Self::Record(record) => Some(&record.previous_hash),
            Self::End(end) => Some(&end.head),
            Self::Neither => None,
        }
    }
}

/// Why a record does not follow.
enum Broken {
    Content,
    Number,
    Link,
}

#[derive(Default)]
struct Reader {
    first: Option<u64>,
    newest: std::collections::VecDeque<Record>,
}

impl Reader {
    fn next_number(&self) -> u64 {
        self.newest.back().map_or(1, |last| last.number + 1)
    }

    fn take(&mut self, record: &Record) -> Result<(), Broken> {
        if record.content_hash().as_ref() != Some(&record.hash) {
            return Err(Broken::Content);
        }
        match self.newest.back() {
            Some(last) if last.hash != record.previous_hash => return Err(Broken::Link),
            Some(last) if last.number + 1 != record.number => return Err(Broken::Number),
            Some(_) => {}
            // The first of all follows nothing, and nothing else does.
            None if (record.number == 1) != (record.previous_hash == hex(&GENESIS)) => {
                return Err(Broken::Number);
            }
            None => self.first = Some(record.number),
        }
        self.newest.push_back(record.clone());
        if self.newest.len() > KEPT_ENTRIES {
            self.newest.pop_front();
        }
        Ok(())
    }

    /// What was done to a file whose `record` does not follow the one before it.
    fn diagnose(&self, broken: Broken, record: &Record, line: u64, next: Option<&Line>) -> Fault {
        let number = self.next_number();
        let changed = |problem| Fault::Changed {
            number,
            line,
            problem,
        };
        let (Broken::Link, Some(last)) = (&broken, self.newest.back()) else {
            return match broken {
                Broken::Content => changed("its content does not give its hash"),
                Broken::Number | Broken::Link => changed("its number is another"),
            };
        };
        let next = next.and_then(Line::follows);
        if next == Some(&last.hash) {
            let number = record.number;
            return Fault::Inserted { number, line };
        }
        let only = self.newest.len() == 1 && record.number < number;
        if record.previous_hash == last.previous_hash || (only && next == Some(&record.hash)) {
            // Two say that they come there, and whoever comes next follows this one.
            return Fault::Inserted {
                number: last.number,
                line: line - 1,
            };
        }
        match record.number {
            given if given > number => Fault::Missing {
                from: number,
                to: given - 1,
            },
            given if given < number => Fault::Inserted {
                number: given,
                line,
            },
            _ => changed("it does not follow the record before it"),
        }
    }

    fn ends(&self, end: &End, line: u64) -> Result<(), Fault> {
        let Some(last) = self.newest.back() else {
            return if end.last < end.first {
                Ok(())
            } else {
                let (from, to) = (end.first, end.last);
                Err(Fault::Missing { from, to })
            };
        };
        let first = self.first.unwrap_or(last.number);
        if first > end.first {
            let (from, to) = (end.first, first - 1);
            return Err(Fault::Missing { from, to });
        }
        if first < end.first {
            let number = first;
            return Err(Fault::Inserted { number, line: 1 });
        }
        if end.last > last.number {
            let (from, to) = (last.number + 1, end.last);
            return Err(Fault::Missing { from, to });
        }
        if end.last < last.number {
            return Err(Fault::Inserted {
                number: end.last + 1,
                line: line - (last.number - end.last),
            });
        }
        if end.head != last.hash {
            let number = last.number;
            return Err(Fault::OtherEnd { number, line });
        }
        Ok(())
    }
}

/// The audit as a cluster has it: the newest entries of a chain that may have begun before them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tail {
    /// Whose.
    pub cluster_id: ClusterId,
    /// Entries that there ever were.
    pub count: u64,
    /// The last one's hash, in hex.
    pub head: String,
    /// The newest, oldest first.
    pub records: Vec<Record>,
}

/// How a whole file and a cluster's audit go together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Joined {
    /// Records that both have, and that are the same.
    pub shared: u64,
    /// Whether the file's chain is seen to lead into the cluster's: they share a record, or one follows
    /// the other. Otherwise what lay between is kept nowhere.
    pub linked: bool,
    /// Entries that the cluster made after the file's last.
    pub newer: u64,
}

impl Tail {
    /// Numbers and checks what a node answered.
    ///
    /// # Errors
    ///
    /// Returns the first entry that does not follow.
    pub fn new(
        cluster_id: ClusterId,
        count: u64,
        entries: &[wire::AuditEntry],
        head: &[u8],
    ) -> Result<Self, Fault> {
        let before = count.saturating_sub(entries.len() as u64);
        let records = (before + 1..).zip(entries);
        let records: Vec<Record> = records
            .map(|(number, entry)| Record::of(number, entry))
            .collect();
        let mut reader = Reader::default();
        for record in &records {
            if let Err(broken) = reader.take(record) {
                return Err(reader.diagnose(broken, record, NO_LINE, None));
            }
        }
        let head = hex(head);
        let last = records.last().map(|last| last.hash.as_str());
        if last.is_some_and(|last| last != head) {
            return Err(Fault::OtherEnd {
                number: count,
                line: NO_LINE,
            });
        }
        Ok(Self {
            cluster_id,
            count,
            head,
            records,
        })
    }

    /// Number of the first entry that is kept.
    #[must_use]
    pub fn begins(&self) -> u64 {
        self.records
            .first()
            .map_or(self.count + 1, |one| one.number)
    }

    /// The end of an export of all this.
    #[must_use]
    pub fn end(&self, first: u64, now: Millis) -> End {
        End {
            schema_version: 1,
            cluster_id: self.cluster_id,
            first,
            last: self.count,
            head: self.head.clone(),
            exported_ms: now.0,
        }
    }

    /// Compares a whole file with what the cluster has.
    ///
    /// # Errors
    ///
    /// Returns the first record that is not the cluster's.
    pub fn check(&self, archive: &Archive) -> Result<Joined, Fault> {
        let end = &archive.end;
        if end.cluster_id != self.cluster_id {
            return Err(Fault::OtherCluster {
                file: end.cluster_id,
                ours: self.cluster_id,
            });
        }
        if end.last > self.count {
            let number = self.count + 1;
            return Err(Fault::Ahead { number });
        }
        let begins = self.begins();
        let mut shared = 0;
        for record in archive.newest.iter().filter(|one| one.number >= begins) {
            let at = usize::try_from(record.number - begins).unwrap_or(usize::MAX);
            if self.records.get(at) != Some(record) {
                return Err(Fault::Changed {
                    number: record.number,
                    line: record.number - end.first + 1,
                    problem: "the cluster has another one",
                });
            }
            shared += 1;
        }
        let follows = end.last + 1 == begins;
        let next = self
            .records
            .first()
            .map_or(&self.head, |one| &one.previous_hash);
        if follows && shared == 0 && *next != end.head {
            let (number, line) = (end.last, end.last.saturating_sub(end.first) + 2);
            return Err(Fault::OtherEnd { number, line });
        }
        Ok(Joined {
            shared,
            linked: shared > 0 || follows,
            newer: self.count - end.last,
        })
    }
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
