//! Paths of chunks that were asked for, as a tree whose edges are runs of chunks.
//!
//! A node stands where a path ended or where two parted. What is counted at a node are the paths that come
//! to it, those that go on included, so that a node which is put into an edge knows what its edge knew.

use std::collections::BTreeSet;

use forebay_proto::Now;

use super::mean::Fading;
use crate::index::Fingerprints;

/// Nodes, and chunks on edges; where there are more, the paths go that were not asked for the longest.
pub(super) const MAX_NODES: usize = 16 << 10;
pub(super) const MAX_CHUNKS: usize = 256 << 10;
/// Of a longer path only the beginning counts.
pub(super) const MAX_PATH: usize = 4_096;

const NONE: u32 = u32::MAX;

/// A node, as long as it is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct NodeId {
    at: u32,
    generation: u32,
}

#[derive(Debug)]
struct Node {
    generation: u32,
    parent: u32,
    /// Its edge; none: it is free.
    chunks: Vec<u64>,
    /// Chunks up to its end.
    end: u32,
    children: u32,
    /// The first chunk that was seen to come next.
    next: Option<u64>,
    /// Another one was seen, too.
    forks: bool,
    /// When it was asked for, in the order of asking.
    stamp: u64,
    key_epoch: u32,
    /// Tokens up to its end, as they were estimated last.
    tokens: u32,
    /// Arrivals, and the time that they took in milliseconds.
    counts: Fading<2>,
}

/// Where a path leaves the last fork that it comes through.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Branch {
    /// The fork's last chunk; 0: there is none on the path.
    pub(super) family: u64,
    pub(super) tokens: u32,
    /// The chunk after it, or the path's first one where there is no fork; 0: there is none.
    pub(super) next: u64,
}

/// A place where paths part.
#[derive(Clone, Copy, Debug)]
pub(super) struct Fork {
    pub(super) node: NodeId,
    pub(super) chunk: u64,
    pub(super) chunks: u32,
    pub(super) tokens: u32,
    pub(super) key_epoch: u32,
    pub(super) counts: Fading<2>,
}

#[derive(Debug, Default)]
pub(super) struct Tree {
    nodes: Vec<Node>,
    free: Vec<u32>,
    /// The node whose edge begins with a chunk: a fingerprint stands for its whole path.
    starts: Fingerprints<u32>,
    /// Nodes without children, by when they were asked for.
    leaves: BTreeSet<(u64, u32)>,
    stamp: u64,
    chunks: usize,
    forks: usize,
}

impl Tree {
    pub(super) fn len(&self) -> usize {
        self.nodes.len() - self.free.len()
    }

    pub(super) const fn chunks(&self) -> usize {
        self.chunks
    }

    pub(super) const fn forks(&self) -> usize {
        self.forks
    }

    /// A path was asked for. Returns its end, none of an empty path, and where it leaves its last fork.
    pub(super) fn ask(
        &mut self,
        now: Now,
        path: &[u64],
        key_epoch: u32,
        tokens_at: impl Fn(usize) -> u32,
    ) -> (Option<NodeId>, Branch) {
        let path = &path[..path.len().min(MAX_PATH)];
        self.stamp += 1;
        let (mut at, mut depth) = (NONE, 0);
        let mut branch = Branch {
            next: path.first().copied().unwrap_or(0),
            ..Branch::default()
        };
        while let Some(next) = path.get(depth) {
            let child = match self.starts.get(next).copied() {
                None => self.grow(at, &path[depth..], key_epoch),
                // Chunks that are no fingerprints of paths: what is known of them is enough.
                Some(child) if self.node(child).parent != at => break,
                Some(child) => {
                    let edge = self.node(child).chunks.iter().zip(&path[depth..]);
                    let same = edge.take_while(|(one, other)| one == other).count();
                    if same < self.node(child).chunks.len() {
                        self.split(child, same)
                    } else {
                        child
                    }
                }
            };
            if at != NONE && self.node(at).forks {
                branch = Branch {
                    family: self.last_chunk(at),
                    tokens: self.node(at).tokens,
                    next: *next,
                };
            }
            at = child;
            depth = self.node(at).end as usize;
            self.touch(at);
            let node = self.node_mut(at);
            node.tokens = tokens_at(depth - 1);
            node.counts.add(now, [1.0, 0.0]);
        }
        if at == NONE {
            return (None, branch);
        }
        if self.node(at).forks {
            branch = Branch {
                family: self.last_chunk(at),
                tokens: self.node(at).tokens,
                next: 0,
            };
        }
        let end = self.id(at);
        self.evict(at);
        (Some(end), branch)
    }

    /// A path that ended there took more of the worker.
    pub(super) fn charge(&mut self, now: Now, end: NodeId, takes_ms: f64) {
        self.up(end, |node| node.counts.add(now, [0.0, takes_ms]));
    }

    /// A path that ended there is none.
    pub(super) fn take_off(&mut self, now: Now, then: Now, end: NodeId, takes_ms: f64) {
        self.up(end, |node| node.counts.take_off(now, then, [1.0, takes_ms]));
    }

    /// Every place where paths part, in no order.
    pub(super) fn all_forks(&self) -> impl Iterator<Item = Fork> {
        let nodes = (0..).zip(&self.nodes);
        let forks = nodes.filter(|(_, node)| node.forks && !node.chunks.is_empty());
        forks.map(|(at, node)| Fork {
            node: self.id(at),
            chunk: self.last_chunk(at),
            chunks: node.end,
            tokens: node.tokens,
            key_epoch: node.key_epoch,
            counts: node.counts,
        })
    }

    /// The chunks at which the nodes above this one end, the nearest first.
    pub(super) fn above(&self, node: NodeId) -> impl Iterator<Item = u64> {
        let mut at = self.found(node).map_or(NONE, |at| self.node(at).parent);
        std::iter::from_fn(move || {
            let here = (at != NONE).then_some(at)?;
            at = self.node(here).parent;
            Some(self.last_chunk(here))
        })
    }

    /// Where a path that ended there leaves the last node that is one of `families`; `None`: the path is
    /// forgotten.
    pub(super) fn branch(&self, end: NodeId, families: &Fingerprints<u32>) -> Option<Branch> {
        let mut at = self.found(end)?;
        let mut next = 0;
        loop {
            let chunk = self.last_chunk(at);
            if let Some(tokens) = families.get(&chunk) {
                return Some(Branch {
                    family: chunk,
                    tokens: *tokens,
                    next,
                });
            }
            next = self.node(at).chunks[0];
            at = self.node(at).parent;
            if at == NONE {
                return Some(Branch {
                    next,
                    ..Branch::default()
                });
            }
        }
    }

    fn up(&mut self, end: NodeId, mut change: impl FnMut(&mut Node)) {
        let mut at = self.found(end).unwrap_or(NONE);
        while at != NONE {
            let node = self.node_mut(at);
            change(node);
            at = node.parent;
        }
    }

    fn found(&self, id: NodeId) -> Option<u32> {
        let node = self.nodes.get(id.at as usize)?;
        (node.generation == id.generation && !node.chunks.is_empty()).then_some(id.at)
    }

    fn id(&self, at: u32) -> NodeId {
        NodeId {
            at,
            generation: self.node(at).generation,
        }
    }

    fn node(&self, at: u32) -> &Node {
        &self.nodes[at as usize]
    }

    fn node_mut(&mut self, at: u32) -> &mut Node {
        &mut self.nodes[at as usize]
    }

    fn last_chunk(&self, at: u32) -> u64 {
        let last = self.node(at).chunks.last();
        *last.expect("an edge has a chunk")
    }

    /// It was asked for just now.
    fn touch(&mut self, at: u32) {
        let stamp = self.stamp;
        let node = self.node_mut(at);
        let before = std::mem::replace(&mut node.stamp, stamp);
        if node.children == 0 && before != stamp {
            self.leaves.remove(&(before, at));
            self.leaves.insert((stamp, at));
        }
    }

    /// A new end below a node.
    fn grow(&mut self, parent: u32, chunks: &[u64], key_epoch: u32) -> u32 {
        let end = self.end_of(parent) + chunks.len() as u32;
        let at = self.put(parent, chunks.to_vec(), end, key_epoch);
        self.chunks += chunks.len();
        self.leaves.insert((self.stamp, at));
        self.adopt(parent, chunks[0]);
        at
    }

    /// A node within an edge, after so many of its chunks, one at least.
    fn split(&mut self, lower: u32, after: usize) -> u32 {
        let parent = self.node(lower).parent;
        let rest = self.node_mut(lower).chunks.split_off(after);
        let (next, epoch) = (rest[0], self.node(lower).key_epoch);
        let chunks = std::mem::replace(&mut self.node_mut(lower).chunks, rest);
        let end = self.end_of(parent) + after as u32;
        let counts = self.node(lower).counts;
        let upper = self.put(parent, chunks, end, epoch);
        self.starts.insert(next, lower);
        self.node_mut(lower).parent = upper;
        let node = self.node_mut(upper);
        (node.children, node.next, node.counts) = (1, Some(next), counts);
        upper
    }

    fn put(&mut self, parent: u32, chunks: Vec<u64>, end: u32, key_epoch: u32) -> u32 {
        let first = chunks[0];
        let mut node = Node {
            generation: 0,
            parent,
            chunks,
            end,
            children: 0,
            next: None,
            forks: false,
            stamp: self.stamp,
            key_epoch,
            tokens: 0,
            counts: Fading::default(),
        };
        let at = match self.free.pop() {
            Some(at) => {
                node.generation = self.node(at).generation;
                self.nodes[at as usize] = node;
                at
            }
            None => {
                self.nodes.push(node);
                self.nodes.len() as u32 - 1
            }
        };
        self.starts.insert(first, at);
        at
    }

    fn end_of(&self, at: u32) -> u32 {
        if at == NONE { 0 } else { self.node(at).end }
    }

    /// It has one child more, whose edge begins with this chunk.
    fn adopt(&mut self, parent: u32, first: u64) {
        if parent == NONE {
            return;
        }
        let node = self.node_mut(parent);
        node.children += 1;
        let (was_leaf, stamp) = (node.children == 1, node.stamp);
        let other = node.next.is_some_and(|next| next != first);
        let forks = other && !node.forks;
        node.forks |= other;
        node.next.get_or_insert(first);
        self.forks += usize::from(forks);
        if was_leaf {
            self.leaves.remove(&(stamp, parent));
        }
    }

    /// Forgets ends until all that is left fits, this one excepted.
    fn evict(&mut self, kept: u32) {
        while self.len() > MAX_NODES || self.chunks > MAX_CHUNKS {
            let Some(&(stamp, oldest)) = self.leaves.first() else {
                return;
            };
            if oldest == kept {
                return;
            }
            self.leaves.remove(&(stamp, oldest));
            let node = self.node_mut(oldest);
            node.generation = node.generation.wrapping_add(1);
            let chunks = std::mem::take(&mut node.chunks);
            let (parent, forked) = (node.parent, node.forks);
            self.starts.remove(&chunks[0]);
            self.chunks -= chunks.len();
            self.forks -= usize::from(forked);
            self.free.push(oldest);
            if parent != NONE {
                let node = self.node_mut(parent);
                node.children -= 1;
                if node.children == 0 {
                    let stamp = node.stamp;
                    self.leaves.insert((stamp, parent));
                }
            }
        }
    }
}
