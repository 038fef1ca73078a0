//! Recorded sessions of a real engine, as they were and with everything that goes wrong on the way.

use std::collections::{BTreeSet, HashMap};
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::sync::LazyLock;
use std::time::Duration;

use forebay_proto::Now;
use proptest::prelude::*;
use serde::Deserialize;

use super::*;

const U64: &str = include_str!("samples/vllm-kv-session.jsonl");
const BYTES: &str = include_str!("samples/vllm-kv-session-cbor-bytes.jsonl");
const BLOCK: usize = 32;
/// Tokens of a chunk: neither a part of a block nor a multiple.
const CHUNK: usize = 20;
const KV_TOKENS: u64 = 3_072;

#[derive(Deserialize)]
struct Line {
    at: f64,
    #[serde(default)]
    seq: u64,
    #[serde(default)]
    payload: String,
    #[serde(default)]
    note: String,
    salt: Option<String>,
    cached: Option<u32>,
    #[serde(default)]
    ids: Vec<u32>,
}

struct Session {
    /// When, its number as it was, and what it says.
    batches: Vec<(f64, u64, Batch)>,
    requests: Vec<Line>,
}

fn session(text: &str) -> Session {
    let lines = text.lines().map(|line| serde_json::from_str(line).unwrap());
    let (batches, requests): (Vec<Line>, Vec<Line>) =
        lines.partition(|line: &Line| line.ids.is_empty());
    let batches = batches.iter().map(|line| {
        let (pairs, _) = line.payload.as_bytes().as_chunks::<2>();
        let byte =
            |pair: &[u8; 2]| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap();
        let payload: Vec<u8> = pairs.iter().map(byte).collect();
        (line.at, line.seq, Batch::decode(&payload).unwrap())
    });
    Session {
        batches: batches.collect(),
        requests,
    }
}

impl Line {
    fn news(&self) -> News {
        let ends: Vec<u32> = (1..=self.ids.len() / CHUNK)
            .map(|chunk| u32::try_from(chunk * CHUNK).unwrap())
            .collect();
        let chunk = |end: &u32| {
            let mut hasher = DefaultHasher::new();
            (&self.salt, &self.ids[..*end as usize]).hash(&mut hasher);
            hasher.finish()
        };
        News {
            chunks: ends.iter().map(chunk).collect(),
            aligned: Aligned {
                ends,
                ..Aligned::default()
            },
            ids: self.ids.clone(),
            scope: self.salt.clone(),
            model: "tiny".into(),
        }
    }
}

const fn at(ms: u64) -> Now {
    Now::at(Duration::from_millis(ms))
}

fn exact(can_ask: bool) -> Exact {
    let mut exact = Exact::new(*b"0123456789abcdef", KV_TOKENS, can_ask);
    exact.begin(None);
    exact
}

/// The engine from its first batch on; its numbers begin at 0.
fn followed_from_the_start(session: &Session, mut each: impl FnMut(&Exact, &Line)) -> Exact {
    let mut exact = exact(true);
    assert_eq!(exact.ask(at(0)), Some(0));
    exact.replay_end();
    let mut batches = (0..).zip(&session.batches).peekable();
    for request in &session.requests {
        while let Some((seq, (_, _, batch))) = batches.next_if(|(_, (at, _, _))| *at < request.at) {
            exact.live(seq, batch.clone());
        }
        each(&exact, request);
        exact.aligned(request.news());
    }
    for (seq, (_, _, batch)) in batches {
        exact.live(seq, batch.clone());
    }
    exact
}

/// What is predicted of each request in turn against what the engine said of it.
fn check(text: &str, least_requests: usize) {
    let session = session(text);
    let (mut judged, mut predicted, mut reported) = (0, 0, 0);
    let exact = followed_from_the_start(&session, |exact, request| {
        // The events of others that run at the same moment are not in.
        let Some(cached) = request.cached.filter(|_| !request.note.contains("burst")) else {
            return;
        };
        let hit = exact.hit(&request.news().chunks, Ahead::Taken);
        assert!(hit.settled && exact.is_whole());
        if request.note == "first request after reset" {
            // An engine that is told to forget says so with its next step.
            return assert_eq!((hit.tokens, cached), (64, 0));
        }
        assert!(
            hit.tokens <= cached,
            "{}: {} of {cached}",
            request.note,
            hit.tokens
        );
        // What a last block that is not full takes away, and a chunk that is not; and two blocks of an
        // answer, which nobody aligns.
        let most = (3 * BLOCK + CHUNK) as u32;
        assert!(
            hit.tokens + most >= cached,
            "{}: {} of {cached}",
            request.note,
            hit.tokens
        );
        judged += 1;
        predicted += hit.tokens;
        reported += cached;
    });
    println!("{judged} requests, {predicted} tokens predicted, {reported} cached");
    assert!(judged >= least_requests && reported > 4_000);
    assert!(f64::from(predicted) >= 0.85 * f64::from(reported));
    assert!(exact.is_whole());
    assert_eq!(
        exact.seen().unknown,
        0,
        "every removal was of a block that was stored"
    );
}

#[test]
fn a_recorded_session_is_predicted() {
    check(U64, 50);
}

#[test]
fn one_with_hashes_of_32_bytes_is_too() {
    check(BYTES, 40);
}

#[test]
fn a_late_reader_knows_that_it_does_not_know() {
    let session = session(U64);
    let mut exact = exact(false);
    let (_, seq, batch) = &session.batches[0];
    assert_eq!(*seq, 15);
    exact.live(*seq, batch.clone());
    assert!(!exact.holds());
    assert_eq!(exact.seen().stream.losses, 1);
    // Until what it knows fills the cache, or the cache is emptied.
    let held = session.batches[1..].iter().position(|(_, seq, batch)| {
        exact.live(*seq, batch.clone());
        exact.holds()
    });
    let blocks = exact.seen().blocks;
    assert!(blocks * BLOCK as u64 * 10 >= KV_TOKENS * 9, "{blocks}");
    assert!(held.unwrap() > 10);
}

type Named = (Option<u64>, Vec<u32>, Vec<Vec<u8>>);

/// An engine, for sure: what it has, how often, in which tokens. Slow and plain.
#[derive(Default)]
struct Oracle {
    copies: HashMap<u64, usize>,
    /// A block's hash by its parent, tokens and salt.
    names: HashMap<Named, u64>,
    said: Vec<Batch>,
}

impl Oracle {
    fn step(&mut self, batch: &Batch) {
        self.said.push(batch.clone());
        for event in &batch.events {
            match event {
                Event::Stored(stored) => {
                    let mut parent = stored.parent;
                    for (at, hash) in stored.hashes.iter().enumerate() {
                        let tokens = stored.tokens[at * BLOCK..(at + 1) * BLOCK].to_vec();
                        let extras = stored.extras.get(at).cloned().unwrap_or_default();
                        self.names.insert((parent, tokens, extras), *hash);
                        *self.copies.entry(*hash).or_default() += 1;
                        parent = Some(*hash);
                    }
                }
                Event::Removed { hashes, .. } => {
                    for hash in hashes {
                        if let Some(copies) = self.copies.get_mut(hash) {
                            *copies = copies.saturating_sub(1);
                        }
                    }
                }
                Event::Cleared => self.copies.clear(),
            }
        }
    }

    /// Leading tokens of a prompt that are there.
    fn cached(&self, request: &Line) -> u32 {
        let (mut parent, mut tokens) = (None, 0);
        for block in request.ids.chunks_exact(BLOCK) {
            let salt = request.salt.iter().filter(|_| parent.is_none());
            let extras: Vec<_> = salt.map(|salt| salt.as_bytes().to_vec()).collect();
            let hash = self.names.get(&(parent, block.to_vec(), extras)).copied();
            let Some(hash) = hash.filter(|hash| self.copies.get(hash).is_some_and(|n| *n > 0))
            else {
                break;
            };
            parent = Some(hash);
            tokens += u32::try_from(BLOCK).unwrap();
        }
        tokens
    }
}

/// What becomes of one batch on its way.
#[derive(Clone, Copy, Debug)]
enum Way {
    Comes,
    /// It is lost.
    Drops,
    /// It comes, and cannot be read.
    Garbled,
    /// It comes behind the next.
    Late,
    /// The engine starts anew before it.
    Restarts,
    /// The link breaks before it, and it is lost.
    Breaks,
    /// This agent starts anew before it, and goes on with what it kept.
    Resumes,
}

/// What becomes of batches that follow one another: losses come in runs.
fn ways() -> impl Strategy<Value = Vec<Way>> {
    let run = prop_oneof![
        10 => (1..12_usize).prop_map(|count| vec![Way::Comes; count]),
        4 => (1..8_usize).prop_map(|count| vec![Way::Drops; count]),
        1 => Just(vec![Way::Garbled]),
        1 => Just(vec![Way::Late]),
        1 => Just(vec![Way::Restarts]),
        2 => (1..6_usize).prop_map(|count| vec![Way::Breaks; count]),
        1 => Just(vec![Way::Resumes]),
    ];
    proptest::collection::vec(run, 81).prop_map(|runs| runs.concat())
}

static SESSION: LazyLock<Session> = LazyLock::new(|| session(U64));

struct World {
    exact: Exact,
    oracle: Oracle,
    /// Batches that the engine can tell again; 0: it cannot.
    buffer: usize,
    ms: u64,
    prompts: Vec<usize>,
}

impl World {
    /// The agent asks while it has something to ask, and the engine answers, or does not.
    fn settle(&mut self, answers: bool) {
        for _ in 0..8 {
            self.ms += 10;
            let Some(from) = self.exact.ask(at(self.ms)) else {
                break;
            };
            if !answers {
                self.ms += 2_500;
                self.exact.pass(at(self.ms));
                continue;
            }
            let said = self.oracle.said.len();
            let from = usize::try_from(from)
                .unwrap()
                .max(said.saturating_sub(self.buffer));
            for seq in from..said {
                let batch = self.oracle.said[seq].clone();
                self.exact.replayed(at(self.ms), seq as u64, batch);
            }
            self.exact.replay_end();
        }
    }

    /// Nothing is claimed to be exact that is not there, and nothing told that is not known.
    fn judge(&mut self, session: &Session) {
        let resident: BTreeSet<_> = self.exact.resident().collect();
        assert_eq!(resident.len(), self.exact.len());
        if !self.exact.is_whole() {
            return;
        }
        for prompt in &self.prompts {
            let request = &session.requests[*prompt];
            let predicted = self.exact.hit(&request.news().chunks, Ahead::Taken).tokens;
            let cached = self.oracle.cached(request);
            assert!(
                predicted <= cached,
                "{}: {predicted} of {cached}",
                request.note
            );
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(100))]
    #[test]
    fn it_is_never_wrong_without_saying_so(
        ways in ways(),
        buffer in prop_oneof![1 => Just(0_usize), 2 => 1..8_usize, 1 => Just(1_000)],
        answers in proptest::collection::vec(prop::bool::weighted(0.9), 81),
    ) {
        let session = &*SESSION;
        let mut world = World {
            exact: exact(buffer > 0),
            oracle: Oracle::default(),
            buffer,
            ms: 0,
            prompts: Vec::new(),
        };
        let mut held_back = None;
        let mut told = BTreeSet::new();
        for (turn, (when, _, batch)) in session.batches.iter().enumerate() {
            for (at, request) in session.requests.iter().enumerate() {
                if request.at < *when && !world.prompts.contains(&at) {
                    world.prompts.push(at);
                    world.exact.aligned(request.news());
                }
            }
            match ways[turn] {
                Way::Restarts => {
                    world.oracle = Oracle::default();
                    held_back = None;
                    world.exact.begin(None);
                }
                Way::Breaks => world.exact.interrupted(),
                Way::Resumes => {
                    let kept = world.exact.kept();
                    world.exact = exact(buffer > 0);
                    world.exact.begin(kept.as_ref());
                    told.clear();
                    for (chunk, _) in world.exact.resident() {
                        told.insert(chunk);
                    }
                    for prompt in &world.prompts {
                        world.exact.aligned(session.requests[*prompt].news());
                    }
                }
                Way::Comes | Way::Drops | Way::Garbled | Way::Late => {}
            }
            let seq = world.oracle.said.len() as u64;
            world.oracle.step(batch);
            match ways[turn] {
                Way::Drops | Way::Breaks => {}
                Way::Garbled => world.exact.garbled(seq, false),
                Way::Late if held_back.is_none() => held_back = Some((seq, batch.clone())),
                Way::Comes | Way::Late | Way::Restarts | Way::Resumes => {
                    world.exact.live(seq, batch.clone());
                    if let Some((seq, batch)) = held_back.take() {
                        world.exact.live(seq, batch);
                    }
                }
            }
            // A batch that was lost shows by the next one, or never.
            let silent = matches!(ways[turn], Way::Drops) || held_back.is_some();
            if !matches!(ways[turn], Way::Breaks) {
                world.settle(answers[turn]);
            }
            if !silent {
                world.judge(session);
            }
            for change in world.exact.take_changes() {
                match change {
                    forebay_scheduler::residency::Change::Stored { chunk, .. } => told.insert(chunk),
                    forebay_scheduler::residency::Change::Removed { chunk } => told.remove(&chunk),
                };
            }
            if let Way::Restarts = ways[turn] {
                // Told as a new life of the cache, not as changes.
                told = world.exact.resident().map(|(chunk, _)| chunk).collect();
            }
            let resident: BTreeSet<_> = world.exact.resident().map(|(chunk, _)| chunk).collect();
            prop_assert_eq!(&told, &resident, "changes lead to what is there");
        }
    }
}

#[test]
fn a_prompt_on_its_way_is_found_by_the_next_and_confirmed_or_withdrawn() {
    let session = session(U64);
    let request = &session.requests[0];
    let news = request.news();
    let mut exact = exact(true);
    let _ = exact.ask(at(0));
    exact.replay_end();
    exact.taken(&news.chunks, |_| Some(BLOCK as u32 * 2));
    let found = |exact: &Exact, ahead| exact.hit(&news.chunks, ahead).chunks;
    let hit = exact.hit(&news.chunks, Ahead::Taken);
    assert_eq!(
        (hit.chunks, hit.tokens, hit.settled),
        (news.chunks.len(), 64, false)
    );
    assert_eq!(
        found(&exact, Ahead::Begun),
        0,
        "the engine does not have it"
    );
    let (own, turn) = exact.begun(&news.chunks, news.chunks.len(), 260);
    assert_eq!((own.chunks, own.tokens), (0, 0), "not by itself");
    assert_eq!(found(&exact, Ahead::Begun), news.chunks.len());
    exact.computed(&news.chunks, turn);
    exact.finished(at(100), &news.chunks, 261);
    exact.pass(at(200));
    assert_eq!(found(&exact, Ahead::Begun), news.chunks.len());
    exact.pass(at(351));
    assert_eq!(found(&exact, Ahead::Taken), 0);
    assert!(exact.is_empty() && exact.resident().count() == 0);
    // What is given up before it was computed is not to come, whether the engine had it or not.
    for begun in [false, true] {
        exact.taken(&news.chunks, |_| Some(64));
        let turn = begun.then(|| exact.begun(&news.chunks, news.chunks.len(), 260).1);
        exact.abandoned(&news.chunks, turn, 260);
        assert_eq!(found(&exact, Ahead::Taken), 0);
    }
    // With its events it stays.
    exact.taken(&news.chunks, |_| Some(64));
    let (_, turn) = exact.begun(&news.chunks, news.chunks.len(), 260);
    exact.aligned(news.clone());
    exact.live(0, session.batches[0].2.clone());
    exact.computed(&news.chunks, turn);
    let hit = exact.hit(&news.chunks, Ahead::Taken);
    assert!(hit.settled && hit.tokens == 256 - 32, "{hit:?}");
}

#[test]
fn what_was_computed_and_is_removed_is_gone_at_once_and_what_is_to_be_computed_is_not() {
    let session = session(U64);
    let news = session.requests[0].news();
    let mut exact = exact(true);
    let _ = exact.ask(at(0));
    exact.replay_end();
    let stored = session.batches[0].2.clone();
    let cleared = Batch {
        at: 0.0,
        events: vec![Event::Cleared],
    };
    exact.live(0, stored.clone());
    exact.aligned(news.clone());
    let whole = exact.hit(&news.chunks, Ahead::Taken);
    // It is evicted before the engine comes to it: it will be computed again.
    exact.taken(&news.chunks, |_| Some(64));
    let (_, turn) = exact.begun(&news.chunks, news.chunks.len(), 260);
    exact.live(1, cleared.clone());
    let hit = exact.hit(&news.chunks, Ahead::Begun);
    assert!(!hit.settled && hit.chunks == news.chunks.len(), "{hit:?}");
    // Its first token comes a moment before the events of its blocks.
    exact.computed(&news.chunks, turn);
    assert_eq!(exact.hit(&news.chunks, Ahead::Begun), hit);
    exact.live(2, stored);
    let hit = exact.hit(&news.chunks, Ahead::Begun);
    assert!(hit.settled, "{hit:?}");
    assert_eq!((hit.chunks, hit.tokens), (whole.chunks, whole.tokens));
    // And its end a moment before they are evicted again: nothing brings them back.
    exact.finished(at(0), &news.chunks, 261);
    exact.live(3, cleared);
    assert_eq!(exact.hit(&news.chunks, Ahead::Taken).chunks, 0);
}

#[test]
fn of_a_block_that_is_not_full_nothing_is_waited_for() {
    let session = session(U64);
    let news = session.requests[0].news();
    let mut exact = exact(true);
    let _ = exact.ask(at(0));
    exact.replay_end();
    // The last chunk of it ends in its last block.
    exact.taken(&news.chunks, |_| Some(256));
    let (_, turn) = exact.begun(&news.chunks, news.chunks.len(), 260);
    exact.computed(&news.chunks, turn);
    exact.live(0, session.batches[0].2.clone());
    let before = exact.hit(&news.chunks, Ahead::Begun);
    assert!(!before.settled && before.chunks == news.chunks.len());
    exact.aligned(news.clone());
    let hit = exact.hit(&news.chunks, Ahead::Begun);
    assert!(hit.settled && hit.tokens == 256 - 32, "{hit:?}");
    let resident: BTreeSet<_> = exact.resident().collect();
    assert_eq!(resident.len(), exact.len());
}

#[test]
fn what_went_before_a_request_began_is_no_fault_of_the_map() {
    let session = session(U64);
    let news = session.requests[0].news();
    let mut exact = exact(true);
    let _ = exact.ask(at(0));
    exact.replay_end();
    exact.live(0, session.batches[0].2.clone());
    exact.aligned(news.clone());
    let foreseen = exact.hit(&news.chunks, Ahead::Taken);
    assert!(exact.judge(&news.chunks, foreseen, foreseen.tokens));
    // It is told that they are gone while the request runs, which found nothing of them.
    exact.live(
        1,
        Batch {
            at: 0.0,
            events: vec![Event::Cleared],
        },
    );
    assert!(!exact.judge(&news.chunks, foreseen, 0));
    let seen = exact.seen();
    assert_eq!((seen.settled.answers, seen.settled.over), (1, 0));
    assert_eq!((seen.promised.answers, seen.promised.over), (1, 1));
    // One that was in all events, and was not there all the same, is.
    exact.live(2, session.batches[0].2.clone());
    let foreseen = exact.hit(&news.chunks, Ahead::Taken);
    assert!(exact.judge(&news.chunks, foreseen, 0));
    assert_eq!(exact.seen().settled.over, 1);
}

#[test]
fn salts_and_adapters_are_caches_of_their_own() {
    let ids: Vec<u32> = (0..64).collect();
    let check = |extras: &[&str], scope: Option<&str>, model: &str, found: bool| {
        let mut exact = exact(false);
        let extras: Vec<_> = extras
            .iter()
            .map(|extra| extra.as_bytes().to_vec())
            .collect();
        let stored = Stored {
            hashes: vec![1, 2],
            parent: None,
            tokens: ids.clone(),
            block_tokens: 32,
            extras: vec![
                extras.clone(),
                extras.into_iter().filter(|e| e == b"lora").collect(),
            ],
            adapter: Some("lora".into()),
            place: Place {
                gpu: true,
                group: 0,
            },
        };
        let events = vec![Event::Stored(stored)];
        exact.live(0, Batch { at: 0.0, events });
        exact.aligned(News {
            chunks: vec![7, 8, 9],
            aligned: Aligned {
                ends: vec![20, 40, 60],
                ..Aligned::default()
            },
            ids: ids.clone(),
            scope: scope.map(str::to_owned),
            model: model.into(),
        });
        let hit = exact.hit(&[7, 8, 9], Ahead::Taken);
        assert_eq!(hit.chunks, if found { 3 } else { 0 });
    };
    check(&[], None, "m", true);
    check(&["a"], Some("a"), "m", true);
    check(&["a"], Some("b"), "m", false);
    check(&["a"], None, "m", false);
    check(&[], Some("a"), "m", false);
    check(&["lora", "a"], Some("a"), "lora", true);
    check(&["lora", "a"], Some("a"), "m", false);
}

#[test]
fn a_hybrid_model_and_other_media_are_not_claimed() {
    let stored = |gpu, group| {
        Event::Stored(Stored {
            hashes: vec![1],
            parent: None,
            tokens: (0..32).collect(),
            block_tokens: 32,
            extras: Vec::new(),
            adapter: None,
            place: Place { gpu, group },
        })
    };
    let mut exact = exact(false);
    exact.live(
        0,
        Batch {
            at: 0.0,
            events: vec![stored(false, 0)],
        },
    );
    assert!(
        exact.holds() && exact.seen().blocks == 0,
        "a tier behind the GPU's"
    );
    exact.live(
        1,
        Batch {
            at: 0.0,
            events: vec![stored(true, 0)],
        },
    );
    assert_eq!(exact.seen().blocks, 1);
    exact.live(
        2,
        Batch {
            at: 0.0,
            events: vec![stored(true, 1)],
        },
    );
    assert!(
        !exact.holds() && exact.seen().blocks == 0,
        "one cache of several"
    );
    exact.begin(None);
    exact.live(
        0,
        Batch {
            at: 0.0,
            events: vec![stored(true, 0)],
        },
    );
    assert!(exact.holds(), "another process is another engine");
}
