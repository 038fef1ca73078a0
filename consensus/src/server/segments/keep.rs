//! Writes entries as they come, and reads them for whoever asks.

use std::path::PathBuf;
use std::sync::{Arc, Weak};
use std::time::Duration;

use forebay_proto::wire::control;
use parking_lot::Mutex;
use tokio::sync::watch;
use tokio::time::{sleep, timeout};

use super::super::publish::Publisher;
use super::{Bounds, SegmentError, Segments};
use crate::fleet::archive::Record;

/// Between two syncs while entries come: what a crash takes is in the state, whose newest entries are more than come
/// in this time.
const SYNC_EVERY: Duration = Duration::from_secs(1);
/// Before the next try where the disk says no.
const TRY_AGAIN: Duration = Duration::from_secs(10);
/// Entries of one answer.
const MOST: usize = 1_000;

/// What a node keeps of the audit. Cheap to clone.
#[derive(Clone, Debug)]
pub(crate) struct Kept {
    dir: PathBuf,
    bounds: Bounds,
    /// None while the disk says no.
    segments: Arc<Mutex<Option<Segments>>>,
}

impl Kept {
    /// Keeps them in this directory, once [`Kept::follow`] runs.
    pub(crate) fn new(dir: PathBuf, bounds: Bounds) -> Self {
        Self {
            dir,
            bounds,
            segments: Arc::default(),
        }
    }

    /// Writes what is published, until nothing is any more.
    pub(crate) async fn follow(self, published: Weak<Publisher>) {
        let Some(mut audited) = published.upgrade().map(|published| published.audited()) else {
            return;
        };
        loop {
            let own = self.clone();
            let from = published.clone();
            let written = tokio::task::spawn_blocking(move || own.write(&from)).await;
            match written {
                Ok(Ok(())) => {}
                Ok(Err(error)) => {
                    tracing::warn!(%error, "the audit's entries are not written to files here; the newest ones are kept by the cluster");
                    *self.segments.lock() = None;
                    sleep(TRY_AGAIN).await;
                }
                // The process ends.
                Err(_) => return,
            }
            if !self.wait(&mut audited).await {
                return;
            }
        }
    }

    /// Until there are more entries; what was written is synced meanwhile. False: there will be none.
    async fn wait(&self, audited: &mut watch::Receiver<u64>) -> bool {
        loop {
            match timeout(SYNC_EVERY, audited.changed()).await {
                Ok(changed) => return changed.is_ok(),
                Err(_) => {
                    let own = self.clone();
                    let synced = tokio::task::spawn_blocking(move || own.sync()).await;
                    if let Ok(Err(error)) = synced {
                        tracing::warn!(%error, "the audit's file is not synced");
                    }
                }
            }
        }
    }

    fn write(&self, published: &Weak<Publisher>) -> Result<(), SegmentError> {
        let mut held = self.segments.lock();
        let segments = match &mut *held {
            Some(segments) => segments,
            none => none.insert(Segments::open(&self.dir, self.bounds)?),
        };
        let Some(published) = published.upgrade() else {
            return segments.sync();
        };
        let (first, entries) = published.audit_after(segments.last());
        drop(published);
        let records: Vec<Record> = (first..)
            .zip(&entries)
            .map(|(number, entry)| Record::of(number, entry))
            .collect();
        segments.append(&records)
    }

    fn sync(&self) -> Result<(), SegmentError> {
        self.segments.lock().as_mut().map_or(Ok(()), Segments::sync)
    }

    /// Entries from this number on.
    ///
    /// # Errors
    ///
    /// Returns why they cannot be read.
    pub(crate) async fn read(
        &self,
        from: u64,
        most: usize,
    ) -> Result<control::AuditTail, SegmentError> {
        let own = self.clone();
        let read = move || {
            let held = own.segments.lock();
            let Some(segments) = &*held else {
                return Ok(control::AuditTail::default());
            };
            let records = segments.read(from, most.min(MOST))?;
            Ok(control::AuditTail {
                entries: records.iter().filter_map(Record::entry).collect(),
                begins: Some(segments.begins()),
                count: Some(segments.last()),
                ..control::AuditTail::default()
            })
        };
        let read = tokio::task::spawn_blocking(read).await;
        // It ends early with its process only.
        read.unwrap_or_else(|_| Ok(control::AuditTail::default()))
    }
}
