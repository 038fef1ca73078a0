//! The cache's events as vLLM 0.32 writes them: a batch for each step that changed something, in msgpack.

use super::text::Answer;
use crate::model::Change;
use std::collections::HashMap;

/// What is published of a request's blocks.
struct Told {
    /// Its prompt's tokens, and those of its answer as far as blocks of them are full.
    ids: Vec<u32>,
    answer: Answer,
    salt: String,
}

/// A batch's number, and what it says.
pub(super) type Batch = (u64, Vec<u8>);

/// Makes batches of what becomes of blocks.
pub(super) struct Events {
    block_tokens: u32,
    told: HashMap<u64, Told>,
    seq: u64,
}

impl Events {
    pub(super) fn new(block_tokens: u32) -> Events {
        Events {
            block_tokens,
            told: HashMap::new(),
            seq: 0,
        }
    }

    /// A request came. As many are kept as run or wait.
    pub(super) fn enter(&mut self, id: u64, ids: Vec<u32>, answer: Answer, salt: String) {
        self.told.insert(id, Told { ids, answer, salt });
    }

    /// It is gone.
    pub(super) fn leave(&mut self, id: u64) {
        self.told.remove(&id);
    }

    /// The next batch and its number; none when nothing changed. `at` is in seconds of Unix time.
    pub(super) fn batch(&mut self, at: f64, changes: &[Change]) -> Option<Batch> {
        if changes.is_empty() {
            return None;
        }
        let mut events = Vec::new();
        let mut count = 0;
        let mut rest = changes;
        while let Some(first) = rest.first() {
            let run = follows(rest);
            let (these, others) = rest.split_at(run);
            rest = others;
            match *first {
                Change::Forgotten { hash } => removed(&mut events, hash),
                Change::Filled {
                    id, block, parent, ..
                } => {
                    let hashes = these.iter().filter_map(|change| match change {
                        Change::Filled { hash, .. } => Some(*hash),
                        Change::Forgotten { .. } => None,
                    });
                    let hashes: Vec<u64> = hashes.collect();
                    let Some(told) = self.told.get_mut(&id) else {
                        continue;
                    };
                    let size = self.block_tokens as usize;
                    let from = block as usize * size;
                    let salt = (block == 0).then(|| told.salt.clone());
                    let tokens = told.tokens(from, from + hashes.len() * size);
                    let size = self.block_tokens;
                    stored(&mut events, &hashes, parent, tokens, size, salt.as_deref());
                }
            }
            count += 1;
        }
        let mut batch = vec![0x93, 0xcb];
        batch.extend_from_slice(&at.to_be_bytes());
        array(&mut batch, count);
        batch.extend_from_slice(&events);
        batch.push(0);
        let seq = self.seq;
        self.seq += 1;
        Some((seq, batch))
    }
}

impl Told {
    fn tokens(&mut self, from: usize, to: usize) -> &[u32] {
        while self.ids.len() < to {
            let token = self.answer.next().expect("an answer has no end");
            self.ids.push(token.id());
        }
        &self.ids[from..to]
    }
}

/// How many of the first changes are one event: blocks of a request that follow one another.
fn follows(changes: &[Change]) -> usize {
    let next = |one: &Change, next: &Change| match (one, next) {
        (
            Change::Filled { id, block, .. },
            Change::Filled {
                id: other,
                block: after,
                ..
            },
        ) => id == other && block + 1 == *after,
        _ => false,
    };
    let run = changes
        .windows(2)
        .take_while(|pair| next(&pair[0], &pair[1]));
    1 + run.count()
}

fn stored(
    out: &mut Vec<u8>,
    hashes: &[u64],
    parent: Option<u64>,
    tokens: &[u32],
    block_tokens: u32,
    salt: Option<&str>,
) {
    out.push(0x8a);
    text(out, "type");
    text(out, "BlockStored");
    text(out, "block_hashes");
    array(out, hashes.len());
    hashes.iter().for_each(|hash| number(out, *hash));
    text(out, "parent_block_hash");
    match parent {
        Some(parent) => number(out, parent),
        None => out.push(0xc0),
    }
    text(out, "token_ids");
    array(out, tokens.len());
    tokens.iter().for_each(|token| number(out, (*token).into()));
    text(out, "block_size");
    number(out, block_tokens.into());
    text(out, "lora_id");
    out.push(0xc0);
    text(out, "medium");
    text(out, "GPU");
    text(out, "lora_name");
    out.push(0xc0);
    text(out, "extra_keys");
    array(out, hashes.len());
    for block in 0..hashes.len() {
        match salt.filter(|salt| block == 0 && !salt.is_empty()) {
            Some(salt) => {
                out.push(0x91);
                text(out, salt);
            }
            None => out.push(0xc0),
        }
    }
    text(out, "group_idx");
    out.push(0);
}

fn removed(out: &mut Vec<u8>, hash: u64) {
    out.push(0x84);
    text(out, "type");
    text(out, "BlockRemoved");
    text(out, "block_hashes");
    array(out, 1);
    number(out, hash);
    text(out, "medium");
    text(out, "GPU");
    text(out, "group_idx");
    out.push(0);
}

fn text(out: &mut Vec<u8>, text: &str) {
    match text.len() {
        length @ 0..32 => out.push(0xa0 | length as u8),
        length => {
            out.push(0xdb);
            out.extend_from_slice(&u32::try_from(length).unwrap_or(u32::MAX).to_be_bytes());
        }
    }
    out.extend_from_slice(text.as_bytes());
}

fn array(out: &mut Vec<u8>, length: usize) {
    match length {
        0..16 => out.push(0x90 | length as u8),
        _ => {
            out.push(0xdd);
            out.extend_from_slice(&u32::try_from(length).unwrap_or(u32::MAX).to_be_bytes());
        }
    }
}

fn number(out: &mut Vec<u8>, number: u64) {
    match number {
        0..128 => out.push(number as u8),
        _ => {
            out.push(0xcf);
            out.extend_from_slice(&number.to_be_bytes());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::text::Prompt;
    use super::*;
    use forebay_worker_agent::core::kv::{Batch as Decoded, Event, Place, Stored};

    #[test]
    fn a_step_is_told_as_vllm_tells_it() {
        let mut events = Events::new(2);
        let answer = Prompt::completion("x").answer();
        let said = answer.clone().next().unwrap().id();
        events.enter(7, vec![1, 70_000, 3], answer, "tenant".into());
        let filled = |block, hash, parent| Change::Filled {
            id: 7,
            block,
            hash,
            parent,
        };
        let changes = [
            Change::Forgotten { hash: u64::MAX },
            filled(0, 10, None),
            filled(1, 11, Some(10)),
        ];
        let (seq, payload) = events.batch(1.5, &changes).unwrap();
        assert_eq!(seq, 0);
        let batch = Decoded::decode(&payload).unwrap();
        assert_eq!(batch.at, 1.5);
        let place = Place {
            gpu: true,
            group: 0,
        };
        let removed = Event::Removed {
            hashes: vec![u64::MAX],
            place,
        };
        let stored = Event::Stored(Stored {
            hashes: vec![10, 11],
            parent: None,
            tokens: vec![1, 70_000, 3, said],
            block_tokens: 2,
            extras: vec![vec![b"tenant".to_vec()], vec![]],
            adapter: None,
            place,
        });
        assert_eq!(batch.events, [removed, stored]);
        let (seq, payload) = events.batch(2.0, &[filled(2, 12, Some(11))]).unwrap();
        let batch = Decoded::decode(&payload).unwrap();
        let [Event::Stored(stored)] = batch.events.as_slice() else {
            panic!("{batch:?}")
        };
        assert_eq!((seq, stored.parent, stored.tokens.len()), (1, Some(11), 2));
        assert_eq!(events.batch(3.0, &[]), None, "nothing is no step");
    }
}
