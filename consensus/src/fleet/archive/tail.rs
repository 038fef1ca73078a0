//! What a cluster has of its audit, and how files go together with it.

use forebay_proto::wire::fleet as wire;
use forebay_proto::{ClusterId, Millis};

use super::read::{Archive, Reader};
use super::{End, Fault, Record, hex};

/// Stands for a place that is in no file: the cluster's own answer.
const NO_LINE: u64 = 0;

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
