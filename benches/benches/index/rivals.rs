//! The index, and two others that answer the same.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};

use dashmap::DashMap;
use forebay_proto::WorkerId;
use forebay_scheduler::index::{Hit, IndexWriter, PrefixIndex};
use parking_lot::{Mutex, RwLock};

/// What is compared. Changes come a path at a time.
pub(crate) trait Rival: Sync {
    const NAME: &'static str;
    fn new() -> Self;
    /// A worker holds these chunks.
    fn store(&self, worker: WorkerId, path: &[u64]);
    /// A worker does not hold those from `from` on any more; from the last to the first.
    fn remove(&self, worker: WorkerId, path: &[u64], from: usize);
    fn hits(&self, path: &[u64], into: &mut Vec<Hit>);
}

fn tokens(at: usize) -> u32 {
    at as u32 * 60 + 60
}

pub(crate) struct Forebay {
    pub(crate) writer: Mutex<IndexWriter>,
    pub(crate) index: PrefixIndex,
}

impl Rival for Forebay {
    const NAME: &'static str = "forebay";

    fn new() -> Self {
        let writer = IndexWriter::default();
        Self {
            index: writer.index().clone(),
            writer: Mutex::new(writer),
        }
    }

    fn store(&self, worker: WorkerId, path: &[u64]) {
        let mut writer = self.writer.lock();
        for (at, chunk) in path.iter().enumerate() {
            writer.store(worker, *chunk, tokens(at));
        }
    }

    fn remove(&self, worker: WorkerId, path: &[u64], from: usize) {
        let mut writer = self.writer.lock();
        for chunk in path[from..].iter().rev() {
            writer.remove(worker, *chunk);
        }
    }

    fn hits(&self, path: &[u64], into: &mut Vec<Hit>) {
        self.index.hits(path, into);
    }
}

#[derive(Clone, Copy)]
struct Holder {
    worker: WorkerId,
    tokens: u32,
}

/// Holders in the order of their workers.
#[derive(Default)]
struct Holders(Vec<Holder>);

impl Holders {
    fn store(&mut self, worker: WorkerId, tokens: u32) {
        match self.0.binary_search_by_key(&worker, |it| it.worker) {
            Ok(at) => self.0[at].tokens = tokens,
            Err(at) => self.0.insert(at, Holder { worker, tokens }),
        }
    }

    /// Returns whether none is left.
    fn remove(&mut self, worker: WorkerId) -> bool {
        if let Ok(at) = self.0.binary_search_by_key(&worker, |it| it.worker) {
            self.0.remove(at);
        }
        self.0.is_empty()
    }

    /// Takes the hits that reach up to chunk `at` one further. Those that go on stand in front. Returns
    /// how many do.
    fn advance(&self, at: usize, alive: usize, into: &mut Vec<Hit>) -> usize {
        let chunks = at as u32 + 1;
        if at == 0 {
            into.extend(self.0.iter().map(|it| Hit {
                worker: it.worker,
                chunks,
                tokens: it.tokens,
            }));
            return into.len();
        }
        let mut next = 0;
        let mut holders = self.0.iter().peekable();
        for hit in 0..alive {
            let worker = into[hit].worker;
            while holders.next_if(|it| it.worker < worker).is_some() {}
            if let Some(holder) = holders.next_if(|it| it.worker == worker) {
                into[hit].chunks = chunks;
                into[hit].tokens = holder.tokens;
                into.swap(hit, next);
                next += 1;
            }
        }
        next
    }
}

#[derive(Default)]
struct Same(u64);

impl Hasher for Same {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, _: &[u8]) {
        unreachable!("fingerprints are numbers")
    }

    fn write_u64(&mut self, value: u64) {
        self.0 = value;
    }
}

type Fingerprints<V> = HashMap<u64, V, BuildHasherDefault<Same>>;

/// A map from each chunk to its holders, in 256 shards with a lock each; a lookup walks the prompt.
pub(crate) struct Sharded(DashMap<u64, Holders, BuildHasherDefault<Same>>);

impl Rival for Sharded {
    const NAME: &'static str = "dashmap of sets";

    fn new() -> Self {
        let hasher = BuildHasherDefault::default();
        Self(DashMap::with_hasher_and_shard_amount(hasher, 256))
    }

    fn store(&self, worker: WorkerId, path: &[u64]) {
        for (at, chunk) in path.iter().enumerate() {
            let mut holders = self.0.entry(*chunk).or_default();
            holders.store(worker, tokens(at));
        }
    }

    fn remove(&self, worker: WorkerId, path: &[u64], from: usize) {
        for chunk in path[from..].iter().rev() {
            self.0
                .remove_if_mut(chunk, |_, holders| holders.remove(worker));
        }
    }

    fn hits(&self, path: &[u64], into: &mut Vec<Hit>) {
        into.clear();
        let mut alive = 0;
        for (at, chunk) in path.iter().enumerate() {
            let Some(holders) = self.0.get(chunk) else {
                return;
            };
            alive = holders.advance(at, alive, into);
            if alive == 0 {
                return;
            }
        }
    }
}

/// A trie with a chunk on each edge, under one lock; a lookup walks down. Changes take the lock once a
/// path, and find their place from the root.
pub(crate) struct Trie(RwLock<Nodes>);

#[derive(Default)]
struct Nodes {
    nodes: Vec<Node>,
    free: Vec<u32>,
}

#[derive(Default)]
struct Node {
    children: Children,
    holders: Holders,
}

#[derive(Default)]
enum Children {
    #[default]
    None,
    One(u64, u32),
    Many(Fingerprints<u32>),
}

impl Children {
    fn find(&self, chunk: u64) -> Option<u32> {
        match self {
            Self::None => None,
            Self::One(only, node) => (*only == chunk).then_some(*node),
            Self::Many(children) => children.get(&chunk).copied(),
        }
    }

    fn insert(&mut self, chunk: u64, node: u32) {
        match self {
            Self::None => *self = Self::One(chunk, node),
            Self::One(first, of_first) => {
                *self = Self::Many([(*first, *of_first), (chunk, node)].into_iter().collect());
            }
            Self::Many(children) => drop(children.insert(chunk, node)),
        }
    }

    fn remove(&mut self, chunk: u64) {
        match self {
            Self::Many(children) => drop(children.remove(&chunk)),
            Self::None | Self::One(..) => *self = Self::None,
        }
    }

    fn is_empty(&self) -> bool {
        match self {
            Self::None => true,
            Self::One(..) => false,
            Self::Many(children) => children.is_empty(),
        }
    }
}

impl Nodes {
    fn node(&mut self) -> u32 {
        if let Some(node) = self.free.pop() {
            return node;
        }
        self.nodes.push(Node::default());
        self.nodes.len() as u32 - 1
    }
}

impl Rival for Trie {
    const NAME: &'static str = "trie of chunks";

    fn new() -> Self {
        let mut nodes = Nodes::default();
        nodes.node();
        Self(RwLock::new(nodes))
    }

    fn store(&self, worker: WorkerId, path: &[u64]) {
        let mut all = self.0.write();
        let mut at = 0;
        for (depth, chunk) in path.iter().enumerate() {
            let child = all.nodes[at as usize].children.find(*chunk);
            let child = child.unwrap_or_else(|| {
                let child = all.node();
                all.nodes[at as usize].children.insert(*chunk, child);
                child
            });
            all.nodes[child as usize]
                .holders
                .store(worker, tokens(depth));
            at = child;
        }
    }

    fn remove(&self, worker: WorkerId, path: &[u64], from: usize) {
        let mut all = self.0.write();
        let mut nodes = vec![0];
        for chunk in path {
            let at = *nodes.last().expect("the root is there") as usize;
            let Some(child) = all.nodes[at].children.find(*chunk) else {
                break;
            };
            nodes.push(child);
        }
        for depth in (from + 1..nodes.len()).rev() {
            let (at, parent) = (nodes[depth], nodes[depth - 1]);
            let node = &mut all.nodes[at as usize];
            if node.holders.remove(worker) && node.children.is_empty() {
                *node = Node::default();
                all.nodes[parent as usize].children.remove(path[depth - 1]);
                all.free.push(at);
            }
        }
    }

    fn hits(&self, path: &[u64], into: &mut Vec<Hit>) {
        into.clear();
        let all = self.0.read();
        let (mut node, mut alive) = (0, 0);
        for (at, chunk) in path.iter().enumerate() {
            let Some(child) = all.nodes[node as usize].children.find(*chunk) else {
                return;
            };
            node = child;
            alive = all.nodes[node as usize].holders.advance(at, alive, into);
            if alive == 0 {
                return;
            }
        }
    }
}
