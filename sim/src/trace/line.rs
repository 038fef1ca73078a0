//! One line of a trace, checked: past this module a request's numbers are in bounds.

use super::{MAX_BLOCKS_PER_REQUEST, MAX_INPUT_TOKENS, MAX_OUTPUT_TOKENS};
use serde::Deserialize;
use std::time::Duration;

/// One recorded request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    /// When it arrived, from the start of the trace.
    pub at: Duration,
    /// Tokens of its prompt.
    pub input_tokens: u32,
    /// Tokens of its answer.
    pub output_tokens: u32,
    /// The KV blocks of its prompt in order, as runs of consecutive ids; empty if unknown.
    pub blocks: Vec<BlockRun>,
    /// The conversation that it belongs to, where the source says.
    pub session: Option<String>,
    /// Its number in the conversation, from 0, where the source says.
    pub turn: Option<u32>,
}

impl Request {
    /// The ids of its blocks, one by one.
    pub fn block_ids(&self) -> impl Iterator<Item = u64> + '_ {
        self.blocks
            .iter()
            .flat_map(|run| run.first..run.first + u64::from(run.count))
    }
}

/// `count` blocks with consecutive ids from `first`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockRun {
    /// The first id.
    pub first: u64,
    /// How many ids; never 0, and `first + count` does not overflow.
    pub count: u32,
}

/// Why a line is not a request.
#[derive(Debug, thiserror::Error)]
pub enum LineError {
    /// Not JSON, a field is missing, or a field has another type.
    #[error(
        "not a request: {0}; a line is a JSON object with timestamp, input_length and output_length"
    )]
    Json(#[from] serde_json::Error),
    /// A number is outside what a trace may hold.
    #[error("{field} is {value}, allowed are {least} to {most}")]
    OutOfRange {
        /// The field as it is named in the file.
        field: &'static str,
        /// What the file says.
        value: u64,
        /// The least allowed value.
        least: u64,
        /// The greatest allowed value.
        most: u64,
    },
    /// A run of block ids is longer than the id space.
    #[error("hash_ids: the run [{first}, {count}] goes past the last id")]
    RunTooLong {
        /// The run's first id.
        first: u64,
        /// The run's length.
        count: u64,
    },
}

impl Request {
    pub(super) fn parse(line: &[u8]) -> Result<Request, LineError> {
        let raw: RawRequest = serde_json::from_slice(line)?;
        let blocks = runs(&raw.hash_ids)?;
        Ok(Request {
            at: Duration::from_millis(within("timestamp", raw.timestamp, 0, MAX_TIMESTAMP_MS)?),
            input_tokens: tokens("input_length", raw.input_length, MAX_INPUT_TOKENS)?,
            output_tokens: tokens("output_length", raw.output_length, MAX_OUTPUT_TOKENS)?,
            blocks,
            session: raw.session,
            turn: raw.turn,
        })
    }
}

#[derive(Deserialize)]
struct RawRequest {
    timestamp: u64,
    input_length: u64,
    output_length: u64,
    #[serde(default)]
    hash_ids: Vec<RawBlocks>,
    #[serde(default)]
    session: Option<String>,
    #[serde(default)]
    turn: Option<u32>,
}

#[derive(Deserialize)]
#[serde(untagged, expecting = "a block id or [first id, count]")]
enum RawBlocks {
    One(u64),
    Run([u64; 2]),
}

fn runs(raw: &[RawBlocks]) -> Result<Vec<BlockRun>, LineError> {
    let mut total = 0_u64;
    let mut runs = Vec::with_capacity(raw.len());
    for element in raw {
        let (first, count) = match *element {
            RawBlocks::One(id) => (id, 1),
            RawBlocks::Run([first, count]) => (first, count),
        };
        within(
            "the count of a run in hash_ids",
            count,
            1,
            MAX_BLOCKS_PER_REQUEST,
        )?;
        first
            .checked_add(count)
            .ok_or(LineError::RunTooLong { first, count })?;
        total += count;
        within("the number of blocks", total, 1, MAX_BLOCKS_PER_REQUEST)?;
        let count = u32::try_from(count).expect("checked against MAX_BLOCKS_PER_REQUEST");
        runs.push(BlockRun { first, count });
    }
    Ok(runs)
}

fn tokens(field: &'static str, value: u64, most: u64) -> Result<u32, LineError> {
    let value = within(field, value, 1, most)?;
    Ok(u32::try_from(value).expect("the bounds of tokens fit 32 bits"))
}

fn within(field: &'static str, value: u64, least: u64, most: u64) -> Result<u64, LineError> {
    if (least..=most).contains(&value) {
        Ok(value)
    } else {
        Err(LineError::OutOfRange {
            field,
            value,
            least,
            most,
        })
    }
}

/// A year: what is later is a unit mistaken.
const MAX_TIMESTAMP_MS: u64 = 366 * 24 * 3600 * 1000;

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[track_caller]
    fn check(line: &str, expected: &str) {
        let got = match Request::parse(line.as_bytes()) {
            Ok(request) => format!(
                "{} {} {} {:?}",
                request.at.as_millis(),
                request.input_tokens,
                request.output_tokens,
                request.block_ids().collect::<Vec<_>>()
            ),
            Err(error) => error.to_string(),
        };
        assert!(
            got.contains(expected),
            "{line}: got {got:?}, expected {expected:?}"
        );
    }

    #[test]
    fn ids_come_alone_or_in_runs() {
        let with = |ids: &str| {
            format!(r#"{{"timestamp":7,"input_length":6,"output_length":5,"hash_ids":{ids}}}"#)
        };
        check(&with("[]"), "7 6 5 []");
        check(&with("[4]"), "7 6 5 [4]");
        check(&with("[0,[14,3],2]"), "7 6 5 [0, 14, 15, 16, 2]");
        check(&with("[[1,2,3]]"), "a block id or [first id, count]");
        check(&with("[[5,0]]"), "the count of a run in hash_ids is 0");
        check(
            &with("[[5,99999999999]]"),
            "the count of a run in hash_ids is 99999999999",
        );
        check(&with("[[18446744073709551615,2]]"), "past the last id");
        check(&with("[-1]"), "a block id or [first id, count]");
        check(&with("[[0,1048576],7]"), "the number of blocks is 1048577");
    }

    #[test]
    fn what_is_out_of_bounds_is_named() {
        check("", "not a request");
        check("[]", "not a request");
        check(r#"{"timestamp":0,"input_length":1}"#, "output_length");
        check(
            r#"{"timestamp":0,"input_length":0,"output_length":1}"#,
            "input_length is 0",
        );
        check(
            r#"{"timestamp":0,"input_length":9999999,"output_length":1}"#,
            "input_length is 999",
        );
        check(
            r#"{"timestamp":0,"input_length":1,"output_length":0}"#,
            "output_length is 0",
        );
        check(
            r#"{"timestamp":1e300,"input_length":1,"output_length":1}"#,
            "not a request",
        );
        check(
            r#"{"timestamp":1700000000000,"input_length":1,"output_length":1}"#,
            "timestamp is 1700000000000",
        );
        check(
            r#"{"timestamp":0,"input_length":1,"output_length":1,"new":{}}"#,
            "0 1 1 []",
        );
    }

    proptest! {
        #[test]
        fn no_line_panics(line in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = Request::parse(&line);
        }

        #[test]
        fn no_almost_good_line_panics(
            numbers in proptest::collection::vec(any::<u64>(), 6),
            cut in 0_usize..120,
        ) {
            let line = format!(
                r#"{{"timestamp":{},"input_length":{},"output_length":{},"hash_ids":[{},[{},{}]]}}"#,
                numbers[0] % 100, numbers[1] % 100, numbers[2] % 100, numbers[3], numbers[4], numbers[5],
            );
            let _ = Request::parse(line.as_bytes());
            let _ = Request::parse(&line.as_bytes()[..cut.min(line.len())]);
        }
    }
}
