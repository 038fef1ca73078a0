//! Reading a file, and finding the first place that does not hold.

use std::collections::VecDeque;
use std::io::{self, BufRead};

use super::super::audit::{GENESIS, KEPT_ENTRIES};
use super::{End, EndLine, Fault, Record, hex};

/// Longest line that is read, in bytes: the texts of an entry are cut far below.
const MAX_LINE_BYTES: u64 = 32 << 10;

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

pub(super) enum Line {
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
#[derive(Clone, Copy)]
pub(super) enum Broken {
    Content,
    Number,
    Link,
}

#[derive(Default)]
pub(super) struct Reader {
    first: Option<u64>,
    newest: VecDeque<Record>,
}

impl Reader {
    fn next_number(&self) -> u64 {
        self.newest.back().map_or(1, |last| last.number + 1)
    }

    pub(super) fn take(&mut self, record: &Record) -> Result<(), Broken> {
        if !record.holds() {
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
    pub(super) fn diagnose(
        &self,
        broken: Broken,
        record: &Record,
        line: u64,
        next: Option<&Line>,
    ) -> Fault {
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
