//! Entries before those that the cluster's state keeps, out of the control nodes' files.

use std::io;

use forebay_consensus::fleet::archive::{Fault, Record, Tail};
use forebay_proto::wire::control::AuditTail;

use super::broken;
use crate::exit::{CliError, Exit};
use crate::verbs::ask::Asked;

/// Entries that are asked for at once.
const PAGE: u32 = 1_000;

/// The first entry from which on a node's files have everything up to those of the tail.
pub(super) async fn begins(asked: &Asked, tail: &Tail) -> u64 {
    let begins = tail.begins();
    if begins == 1 {
        return 1;
    }
    let answers = asked.client.audit_files(begins, 1, asked.timeout).await;
    let reaches = |told: &AuditTail| told.count.is_some_and(|newest| newest + 1 >= begins);
    let files = answers.into_iter().filter(reaches);
    let first = files.filter_map(|told| told.begins).min();
    first.map_or(begins, |first| first.min(begins))
}

/// Reads the entries from this number on that are older than the tail's, in order. Each has to follow the one before it,
/// the first of them the one with the hash `head`, and the tail the last.
///
/// # Errors
///
/// Names the first that is not there or does not follow, or returns what `seen` says.
pub(super) async fn each(
    asked: &Asked,
    tail: &Tail,
    from: u64,
    mut head: Option<String>,
    mut seen: impl FnMut(Record) -> io::Result<()>,
) -> Result<(), CliError> {
    let whose = "a control node's file of the audit";
    let changed = |number, problem| {
        let line = 0;
        let fault = Fault::Changed {
            number,
            line,
            problem,
        };
        broken(whose, &fault)
    };
    let (mut next, end) = (from, tail.begins());
    while next < end {
        let answers = asked.client.audit_files(next, PAGE, asked.timeout).await;
        let page = answers.into_iter().max_by_key(|told| told.entries.len());
        let entries = page.map(|told| told.entries).unwrap_or_default();
        if entries.is_empty() {
            let message = format!(
                "entry {next} is in the files of no control node that answered: look at those that did not, or begin another file"
            );
            return Err(CliError::because(Exit::Conflict, message));
        }
        for (number, entry) in (next..end).zip(&entries) {
            let record = Record::of(number, entry);
            if !record.holds() {
                return Err(changed(number, "its content does not give its hash"));
            }
            if head.is_some_and(|head| head != record.previous_hash) {
                return Err(changed(number, "it does not follow the record before it"));
            }
            head = Some(record.hash.clone());
            next = number + 1;
            seen(record).map_err(|error| CliError::because(Exit::Failed, error.to_string()))?;
        }
    }
    let follows = tail.records.first().map(|record| &record.previous_hash);
    match (head, follows) {
        (Some(head), Some(follows)) if head != *follows => {
            Err(changed(end, "it does not follow the record before it"))
        }
        _ => Ok(()),
    }
}
