//! One record of the log: `crc32c 4 | length 4 | kind 1 | synced 8 | term 8 | index 8 | payload`.
//!
//! The checksum covers all after it. `synced` is how many bytes of the segment were durable when this
//! record was written.

use bytes::Bytes;

use super::error::StoreError;
use crate::bug::{Bug, on};
use crate::node::{Entry, HardState};

const ENTRY: u8 = 1;
const HARD_STATE: u8 = 2;
const RESET: u8 = 3;
/// An entry that changes the members: the change's length (4), the change, then the command.
const MEMBERS: u8 = 4;
const HEAD_BYTES: usize = 33;
/// Twice the largest command.
const MAX_PAYLOAD_BYTES: usize = 2 << 20;

#[derive(Debug, PartialEq)]
pub(crate) enum Record {
    Entry(Entry),
    HardState(HardState),
    Reset { index: u64 },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Bad {
    #[error("a record is cut")]
    Cut,
    #[error("a record's length is out of range")]
    Length,
    #[error("a record's checksum is wrong")]
    Checksum,
    #[error("a record's kind is unknown")]
    Kind,
    #[error("a record was written elsewhere in the log")]
    Place,
}

pub(crate) fn entry(to: &mut Vec<u8>, synced: u64, entry: &Entry) -> Result<(), StoreError> {
    let bytes = entry.data.len() + entry.change.as_ref().map_or(0, |change| change.len() + 4);
    if bytes > MAX_PAYLOAD_BYTES {
        return Err(StoreError::TooLarge {
            what: "entry",
            bytes,
            max: MAX_PAYLOAD_BYTES,
        });
    }
    let numbers = [synced, entry.term, entry.index];
    match &entry.change {
        None => put(to, ENTRY, numbers, &entry.data),
        Some(change) => {
            // It is part of what was just measured.
            let length = (change.len() as u32).to_le_bytes();
            put(
                to,
                MEMBERS,
                numbers,
                &[&length, &change[..], &entry.data].concat(),
            );
        }
    }
    Ok(())
}

pub(crate) fn hard_state(to: &mut Vec<u8>, synced: u64, state: HardState) {
    put(
        to,
        HARD_STATE,
        [synced, state.term, state.commit],
        &state.vote.to_le_bytes(),
    );
}

pub(crate) fn reset(to: &mut Vec<u8>, synced: u64, index: u64, term: u64) {
    put(to, RESET, [synced, term, index], &[]);
}

fn put(to: &mut Vec<u8>, kind: u8, numbers: [u64; 3], payload: &[u8]) {
    let start = to.len();
    to.extend_from_slice(&[0; 4]);
    // Payloads are at most `MAX_PAYLOAD_BYTES`.
    to.extend_from_slice(&(payload.len() as u32).to_le_bytes());
    to.push(kind);
    for number in numbers {
        to.extend_from_slice(&number.to_le_bytes());
    }
    to.extend_from_slice(payload);
    let crc = crc32c::crc32c(&to[start + 4..]);
    to[start..start + 4].copy_from_slice(&crc.to_le_bytes());
}

/// Reads the record at `at`; returns it and where the next one begins.
///
/// `synced` is what the record before it says; it never falls, so an old piece of the log is not taken
/// for news where a disk shows it in a wrong place.
pub(crate) fn read(bytes: &[u8], at: usize, synced: &mut u64) -> Result<(Record, usize), Bad> {
    let (head, payload, end) = frame(bytes, at)?;
    let said = number(head, 9);
    if !(*synced..=at as u64).contains(&said) {
        return Err(Bad::Place);
    }
    *synced = said;
    let (term, index) = (number(head, 17), number(head, 25));
    let record = match (head[8], payload.len()) {
        (ENTRY, _) => Record::Entry(Entry::command(index, term, Bytes::copy_from_slice(payload))),
        (MEMBERS, 4..) => {
            let end = 4 + number32(payload, 0) as usize;
            let change = payload.get(4..end).ok_or(Bad::Length)?;
            Record::Entry(Entry {
                change: Some(Bytes::copy_from_slice(change)),
                ..Entry::command(index, term, Bytes::copy_from_slice(&payload[end..]))
            })
        }
        (HARD_STATE, 8) => Record::HardState(HardState {
            term,
            vote: number(payload, 0),
            commit: index,
        }),
        (RESET, 0) => Record::Reset { index },
        _ => return Err(Bad::Kind),
    };
    Ok((record, end))
}

/// Whether a whole record after `bad` was written when `bad` had already been synced.
pub(crate) fn proves_synced(bytes: &[u8], bad: usize) -> bool {
    (bad + 1..bytes.len().saturating_sub(HEAD_BYTES - 1))
        .filter(|&at| (ENTRY..=MEMBERS).contains(&bytes[at + 8]))
        // Before the checksum, which may cover megabytes of whatever stands there.
        .filter(|&at| (bad as u64 + 1..=at as u64).contains(&number(bytes, at + 9)))
        .any(|at| frame(bytes, at).is_ok())
}

fn frame(bytes: &[u8], at: usize) -> Result<(&[u8], &[u8], usize), Bad> {
    let head = bytes.get(at..at + HEAD_BYTES).ok_or(Bad::Cut)?;
    let length = number32(head, 4) as usize;
    if length > MAX_PAYLOAD_BYTES {
        return Err(Bad::Length);
    }
    let end = at + HEAD_BYTES + length;
    let body = bytes.get(at + 4..end).ok_or(Bad::Cut)?;
    if crc32c::crc32c(body) != number32(head, 0) && !on(Bug::ChecksumIgnored) {
        return Err(Bad::Checksum);
    }
    Ok((head, &bytes[at + HEAD_BYTES..end], end))
}

/// The number at `at` of bytes that are known to reach that far.
pub(crate) fn number(bytes: &[u8], at: usize) -> u64 {
    let mut number = [0; 8];
    number.copy_from_slice(&bytes[at..at + 8]);
    u64::from_le_bytes(number)
}

fn number32(bytes: &[u8], at: usize) -> u32 {
    let mut number = [0; 4];
    number.copy_from_slice(&bytes[at..at + 4]);
    u32::from_le_bytes(number)
}
