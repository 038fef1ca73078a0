//! The stream of residency under faults that QUIC hides and those that it does not: whatever comes, what
//! a balancer believes to know of a worker's cache is what the agent had, or is marked as not known.
#![allow(clippy::unwrap_used, clippy::panic)] // a test's helpers fail as its assertions do

use std::collections::{BTreeMap, VecDeque};

use bytes::Bytes;
use forebay_proto::frame::{Frame, Kind};
use forebay_proto::wire::work;
use forebay_proto::{Incarnation, WorkerId};
use forebay_scheduler::index::IndexWriter;
use forebay_scheduler::residency::{
    Change, Cursor, Follower, Grade, MAX_CHUNKS, MAX_DELTA_BYTES, MAX_DELTAS, Next, Op, Publisher,
    Resync,
};
use proptest::prelude::*;

const WORKER: WorkerId = WorkerId(1);
/// Holds every chunk that is looked at, and is never to be touched.
const OTHER: WorkerId = WorkerId(2);
/// Chunks that come and go.
const UNIVERSE: u64 = 24;

type Cache = BTreeMap<u64, u32>;

#[derive(Clone, Debug)]
enum Message {
    Snapshot(work::ResidencySnapshot),
    Delta(work::ResidencyDelta),
}

/// The agent's end of one stream: what it believes to have told, and what is under way.
struct Stream {
    told: Option<Cursor>,
    under_way: VecDeque<Message>,
}

/// One agent, its engine, and one balancer.
struct World {
    publisher: Publisher,
    start: u32,
    cache: u64,
    truth: Cache,
    /// What was resident as of each flush of this start.
    told: BTreeMap<(u64, u64), Cache>,
    stream: Option<Stream>,
    /// Of the start before, still under way somewhere.
    stray: Vec<Message>,
    follower: Follower,
    index: IndexWriter,
    /// Resident beside the universe, so that a snapshot has several pieces.
    base: u64,
}

const fn incarnation(start: u32) -> Incarnation {
    Incarnation {
        worker: WORKER,
        grant: 1,
        start,
    }
}

fn fresh_index() -> IndexWriter {
    let mut index = IndexWriter::default();
    (0..UNIVERSE).for_each(|chunk| index.store(OTHER, chunk, 7));
    index
}

impl World {
    fn new(base: u64) -> Self {
        let mut world = Self {
            publisher: Publisher::new(incarnation(1), 1, Grade::Inferred),
            start: 1,
            cache: 1,
            truth: Cache::new(),
            told: BTreeMap::new(),
            stream: None,
            stray: Vec::new(),
            follower: Follower::new(incarnation(1)),
            index: fresh_index(),
            base,
        };
        world.fill();
        world
    }

    fn fill(&mut self) {
        let base = (1_000..1_000 + self.base).map(|chunk| (chunk, 3));
        self.truth.extend(base);
        let stored = self.truth.iter();
        let stored = stored.map(|(chunk, tokens)| Change::Stored {
            chunk: *chunk,
            tokens: *tokens,
        });
        self.publisher.note(stored.collect::<Vec<_>>());
        self.publisher.flush();
        self.record();
    }

    fn record(&mut self) {
        let Cursor { cache, seq } = self.publisher.newest();
        self.told.insert((cache, seq), self.truth.clone());
    }

    fn step(&mut self, step: &Step) {
        match step {
            Step::Change(changes) => {
                for (chunk, tokens) in changes {
                    let change = match tokens {
                        Some(tokens) => {
                            self.truth.insert(*chunk, *tokens);
                            Change::Stored {
                                chunk: *chunk,
                                tokens: *tokens,
                            }
                        }
                        None => {
                            self.truth.remove(chunk);
                            Change::Removed { chunk: *chunk }
                        }
                    };
                    self.publisher.note([change]);
                }
            }
            Step::Flush => {
                if self.publisher.flush() {
                    self.record();
                }
            }
            Step::Churn => {
                for round in 0..=MAX_DELTAS as u64 {
                    let chunk = round % UNIVERSE;
                    let tokens = 100 + u32::try_from(round).unwrap();
                    self.truth.insert(chunk, tokens);
                    self.publisher.note([Change::Stored { chunk, tokens }]);
                    assert!(self.publisher.flush());
                }
                self.record();
            }
            Step::Open => {
                self.stream = Some(Stream {
                    told: self.follower.cursor(),
                    under_way: VecDeque::new(),
                });
            }
            Step::Tell => self.tell(),
            Step::Deliver(fate) => self.deliver(*fate),
            Step::AgentRestarts { keeps } => {
                self.start += 1;
                self.cache += 100;
                self.publisher =
                    Publisher::new(incarnation(self.start), self.cache, Grade::Inferred);
                self.told.clear();
                let stream = self.stream.take();
                self.stray = stream.map_or_else(Vec::new, |stream| stream.under_way.into());
                if !keeps {
                    self.truth.clear();
                }
                self.fill();
                // The link is gone: so is what was known by it.
                self.index.clear(WORKER);
                self.follower = Follower::new(incarnation(self.start));
            }
            Step::EngineRestarts => {
                self.cache += 1;
                self.truth.clear();
                self.publisher =
                    Publisher::new(incarnation(self.start), self.cache, Grade::Inferred);
                self.record();
            }
            Step::BalancerRestarts => {
                self.stream = None;
                self.index = fresh_index();
                self.follower = Follower::new(incarnation(self.start));
            }
            Step::Stray => {
                if let Some(message) = self.stray.pop() {
                    self.take(&message);
                }
            }
        }
    }

    fn tell(&mut self) {
        let newest = self.publisher.newest();
        let Some(stream) = &mut self.stream else {
            return;
        };
        match self.publisher.since(stream.told) {
            Next::Nothing => {}
            Next::Snapshot(pieces) => {
                let pieces = pieces.into_iter().map(Message::Snapshot);
                stream.under_way.extend(pieces);
            }
            Next::Deltas(deltas) => {
                let deltas = deltas.iter().map(|delta| Message::Delta((**delta).clone()));
                stream.under_way.extend(deltas);
            }
        }
        stream.told = Some(newest);
    }

    fn deliver(&mut self, fate: Fate) {
        let Some(stream) = &mut self.stream else {
            return;
        };
        let Some(mut message) = stream.under_way.pop_front() else {
            return;
        };
        match fate {
            Fate::Arrives => self.take(&message),
            Fate::Lost => {}
            Fate::Doubled => {
                self.take(&message);
                self.take(&message);
            }
            Fate::Late => {
                let later = stream.under_way.pop_front();
                stream.under_way.push_front(message);
                if let Some(later) = later {
                    self.take(&later);
                }
            }
            Fate::Damaged(how, at, with) => {
                message.damage(how, at, with);
                self.take(&message);
            }
        }
    }

    fn take(&mut self, message: &Message) {
        let ops = match message {
            Message::Snapshot(piece) => self.follower.snapshot(piece),
            Message::Delta(delta) => self.follower.delta(delta),
        };
        match ops {
            Ok(ops) => ops.iter().for_each(|op| match *op {
                Op::Clear => self.index.clear(WORKER),
                Op::Store(chunk, tokens) => self.index.store(WORKER, chunk, tokens),
                Op::Remove(chunk) => self.index.remove(WORKER, chunk),
            }),
            Err(_) => {
                assert_eq!(self.follower.cursor(), None, "marked as not known");
                self.index.clear(WORKER);
                self.stream = None;
            }
        }
    }

    /// What the index says of one worker, of the universe.
    fn indexed(&self, worker: WorkerId) -> Cache {
        let mut hits = Vec::new();
        let mut held = Cache::new();
        for chunk in 0..UNIVERSE {
            self.index.index().hits(&[chunk], &mut hits);
            let mut hits = hits.iter();
            held.extend(
                hits.find(|hit| hit.worker == worker)
                    .map(|hit| (chunk, hit.tokens)),
            );
        }
        held
    }

    fn check(&self) -> Result<(), TestCaseError> {
        prop_assert_eq!(self.indexed(OTHER).len() as u64, UNIVERSE);
        let (deltas, bytes) = self.publisher.ring();
        prop_assert!(deltas <= MAX_DELTAS && bytes <= MAX_DELTA_BYTES);
        prop_assert!(self.follower.len() as u64 <= UNIVERSE + self.base + 64);
        let Some(Cursor { cache, seq }) = self.follower.cursor() else {
            return Ok(());
        };
        let Some(had) = self.told.get(&(cache, seq)) else {
            return Err(TestCaseError::fail(format!("never told: {cache}/{seq}")));
        };
        prop_assert_eq!(self.index.index().len() as u64, had.len() as u64 + UNIVERSE);
        let of_universe = had.range(..UNIVERSE);
        let of_universe: Cache = of_universe
            .map(|(chunk, tokens)| (*chunk, *tokens))
            .collect();
        prop_assert_eq!(self.indexed(WORKER), of_universe);
        Ok(())
    }

    /// Without faults, one new stream is enough.
    fn settle(&mut self) -> Result<(), TestCaseError> {
        self.step(&Step::Flush);
        self.step(&Step::Open);
        self.step(&Step::Tell);
        while self
            .stream
            .as_ref()
            .is_some_and(|s| !s.under_way.is_empty())
        {
            self.step(&Step::Deliver(Fate::Arrives));
        }
        prop_assert_eq!(self.follower.cursor(), Some(self.publisher.newest()));
        self.check()
    }
}

impl Message {
    /// Changes what the checksum is for. What says which stream and which message it is, QUIC guards.
    fn damage(&mut self, how: u8, at: u8, with: u8) {
        match self {
            Self::Snapshot(piece) => match how % 4 {
                0 => piece.checksum ^= u64::from(with) << (at % 57),
                1 => piece.stored = changed(&piece.stored, at, with),
                2 => piece.stored = cut(&piece.stored, at),
                _ => piece.stored = doubled(&piece.stored),
            },
            Self::Delta(delta) => match how % 6 {
                0 => delta.checksum ^= u64::from(with) << (at % 57),
                1 => delta.stored = changed(&delta.stored, at, with),
                2 => delta.removed = changed(&delta.removed, at, with),
                3 => delta.stored = cut(&delta.stored, at),
                4 => delta.removed = cut(&delta.removed, at),
                _ => delta.seq = delta.seq.wrapping_add(u64::from(with)),
            },
        }
    }
}

fn changed(bytes: &Bytes, at: u8, with: u8) -> Bytes {
    let mut bytes = bytes.to_vec();
    let at = usize::from(at) % bytes.len().max(1);
    if let Some(byte) = bytes.get_mut(at) {
        *byte ^= with;
    }
    bytes.into()
}

fn cut(bytes: &Bytes, at: u8) -> Bytes {
    bytes.slice(..bytes.len().saturating_sub(usize::from(at)))
}

fn doubled(bytes: &Bytes) -> Bytes {
    [&bytes[..], &bytes[..]].concat().into()
}

#[derive(Clone, Copy, Debug)]
enum Fate {
    Arrives,
    Lost,
    Doubled,
    /// After the one behind it.
    Late,
    Damaged(u8, u8, u8),
}

#[derive(Clone, Debug)]
enum Step {
    Change(Vec<(u64, Option<u32>)>),
    Flush,
    /// More deltas than the ring holds: who is behind gets a snapshot.
    Churn,
    /// The balancer asks again, from where it is.
    Open,
    /// The agent sends what is missing by its word.
    Tell,
    Deliver(Fate),
    /// With its map, or without one.
    AgentRestarts {
        keeps: bool,
    },
    EngineRestarts,
    BalancerRestarts,
    /// Something of the start before arrives.
    Stray,
}

fn fate() -> impl Strategy<Value = Fate> {
    prop_oneof![
        20 => Just(Fate::Arrives),
        1 => Just(Fate::Lost),
        1 => Just(Fate::Doubled),
        1 => Just(Fate::Late),
        1 => (any::<u8>(), any::<u8>(), 1..=255_u8).prop_map(|(how, at, with)| Fate::Damaged(how, at, with)),
    ]
}

fn step() -> impl Strategy<Value = Step> {
    let changes = (0..UNIVERSE, proptest::option::weighted(0.6, 0..4_u32));
    prop_oneof![
        6 => proptest::collection::vec(changes, 1..6).prop_map(Step::Change),
        6 => Just(Step::Flush),
        2 => Just(Step::Open),
        6 => Just(Step::Tell),
        10 => fate().prop_map(Step::Deliver),
        1 => any::<bool>().prop_map(|keeps| Step::AgentRestarts { keeps }),
        1 => Just(Step::EngineRestarts),
        1 => Just(Step::BalancerRestarts),
        1 => Just(Step::Stray),
        1 => Just(Step::Churn),
    ]
}

fn play(base: u64, steps: &[Step]) -> Result<World, TestCaseError> {
    let mut world = World::new(base);
    for step in steps {
        world.step(step);
        world.check()?;
    }
    world.settle()?;
    Ok(world)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(500))]
    #[test]
    fn what_a_balancer_believes_to_know_is_what_the_agent_had(
        steps in proptest::collection::vec(step(), 1..150)
    ) {
        play(0, &steps)?;
    }

    #[test]
    fn arbitrary_bytes_are_no_message_or_one_that_does_no_harm(
        frames in proptest::collection::vec((0..3_u8, proptest::collection::vec(any::<u8>(), 0..120)), 1..8)
    ) {
        let mut follower = Follower::new(incarnation(1));
        for (kind, bytes) in frames {
            let frame = |kind| Frame::new(kind, Bytes::from(bytes.clone()));
            match kind {
                0 => drop(frame(Kind::Follow).decode::<work::Follow>()),
                1 => if let Ok(piece) = frame(Kind::ResidencySnapshot).decode() {
                    let _ = follower.snapshot(&piece);
                },
                _ => if let Ok(delta) = frame(Kind::ResidencyDelta).decode() {
                    let _ = follower.delta(&delta);
                },
            }
        }
    }

    #[test]
    fn whole_messages_with_arbitrary_fields_do_no_harm(
        messages in proptest::collection::vec(message(), 1..12)
    ) {
        let mut follower = Follower::new(incarnation(1));
        for message in messages {
            let ops = match &message {
                Message::Snapshot(piece) => follower.snapshot(piece),
                Message::Delta(delta) => follower.delta(delta),
            };
            prop_assert!(ops.is_ok() || follower.cursor().is_none());
            prop_assert!(follower.len() <= 12 * 8);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(6))]
    #[test]
    fn so_it_is_with_snapshots_of_several_pieces(
        steps in proptest::collection::vec(step(), 1..60)
    ) {
        play(17_000, &steps)?;
    }
}

/// A message as a peer could make it up, right in much so that it comes far.
fn message() -> impl Strategy<Value = Message> {
    let seq = prop_oneof![Just(0), Just(1), Just(2), Just(u64::MAX), any::<u64>()];
    let checksum = prop_oneof![3 => Just(0), 1 => any::<u64>()];
    let bytes =
        prop_oneof![3 => Just(Vec::new()), 1 => proptest::collection::vec(any::<u8>(), 0..96)];
    (
        (any::<bool>(), any::<bool>(), any::<bool>()),
        (seq, checksum, any::<i32>(), 0..3_u32),
        (bytes.clone(), bytes),
    )
        .prop_map(
            |((snapshot, first, last), (seq, checksum, grade, start), (stored, removed))| {
                if snapshot {
                    Message::Snapshot(work::ResidencySnapshot {
                        incarnation: Some(incarnation(start).to_wire()),
                        cache: 1,
                        seq,
                        grade,
                        stored: stored.into(),
                        first,
                        last,
                        checksum,
                    })
                } else {
                    Message::Delta(work::ResidencyDelta {
                        seq,
                        grade,
                        stored: stored.into(),
                        removed: removed.into(),
                        checksum,
                        cache: seq % 3,
                    })
                }
            },
        )
}

#[test]
fn nothing_follows_the_last_sequence_number() {
    let mut follower = Follower::new(incarnation(1));
    let last = work::ResidencySnapshot {
        incarnation: Some(incarnation(1).to_wire()),
        seq: u64::MAX,
        first: true,
        last: true,
        ..work::ResidencySnapshot::default()
    };
    follower.snapshot(&last).unwrap();
    let next = follower.delta(&work::ResidencyDelta::default());
    assert_eq!(next, Err(Resync::Gap));
}

#[test]
fn a_ring_and_a_snapshot_are_bounded_whatever_is_noted() {
    let mut publisher = Publisher::new(incarnation(1), 1, Grade::Inferred);
    for round in 0..200_u64 {
        let chunks = (0..8_000).map(|n| Change::Stored {
            chunk: round * 8_000 + n,
            tokens: 1,
        });
        publisher.note(chunks);
        publisher.flush();
        let (deltas, bytes) = publisher.ring();
        assert!(
            deltas <= MAX_DELTAS && bytes <= MAX_DELTA_BYTES,
            "{deltas}, {bytes}"
        );
    }
    assert_eq!(publisher.len(), MAX_CHUNKS, "what is more is not told");

    let Next::Snapshot(pieces) = publisher.since(None) else {
        panic!("it has nothing");
    };
    let mut follower = Follower::new(incarnation(1));
    for piece in &pieces {
        follower.snapshot(piece).unwrap();
    }
    assert_eq!(follower.len(), MAX_CHUNKS);
    // One that goes on for ever is given up.
    let mut more = pieces[0].clone();
    more.last = false;
    follower.snapshot(&more).unwrap();
    more.first = false;
    let refused = pieces.iter().cycle().find_map(|piece| {
        let mut piece = piece.clone();
        (piece.first, piece.last) = (false, false);
        // Other chunks each time.
        let stored: Vec<u8> = piece.stored.iter().map(|byte| byte ^ 0x5a).collect();
        piece.stored = stored.into();
        follower.snapshot(&piece).err()
    });
    assert_eq!(refused, Some(Resync::Malformed));
    assert!(follower.is_empty());
}
