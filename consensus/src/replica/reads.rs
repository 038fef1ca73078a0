//! Linearizable reads: asked in groups, asked again when nothing comes, answered once applied.
//!
//! One group is out at a time; reads that come meanwhile form the next one. So there is one round of
//! heartbeats for any number of reads, and an answer always belongs to a question that was asked after
//! its reads arrived. raft-rs drops questions silently: a group is asked again, with a new number,
//! every [`RETRY`], and the answer to any of its numbers will do.

use std::collections::VecDeque;
use std::time::Duration;

use forebay_proto::Now;
use tokio::sync::oneshot;

use super::handle::ReadError;
use crate::node::ReadReady;

/// A question without an answer is asked again after this.
const RETRY: Duration = Duration::from_millis(100);
/// Reads that wait here; more are refused.
const MAX_READS: usize = 16_384;
/// Numbers of one group that are still good; older ones are forgotten.
const MAX_ASKED: usize = 64;

type Reply = oneshot::Sender<Result<u64, ReadError>>;

#[derive(Default)]
pub(crate) struct Reads {
    next_ctx: u64,
    gathering: Vec<Reply>,
    asked: Option<Asked>,
    /// Confirmed, but the machine is not there yet.
    confirmed: VecDeque<(u64, Vec<Reply>)>,
    waiting: usize,
}

struct Asked {
    numbers: VecDeque<u64>,
    at: Now,
    replies: Vec<Reply>,
}

impl Reads {
    pub(crate) fn add(&mut self, reply: Reply) {
        if self.waiting >= MAX_READS {
            // The receiver may have gone; either way there is nothing more to do.
            let _ = reply.send(Err(ReadError::Overloaded));
            return;
        }
        self.waiting += 1;
        self.gathering.push(reply);
    }

    /// The number to ask with, if it is time to ask.
    pub(crate) fn question(&mut self, now: Now) -> Option<u64> {
        if let Some(asked) = &mut self.asked {
            if now.since(asked.at) < RETRY {
                return None;
            }
            crate::probe::hit(crate::probe::Probe::ReadAskedAgain);
            let before = asked.replies.len();
            asked.replies.retain(|reply| !reply.is_closed());
            self.waiting -= before - asked.replies.len();
            if asked.replies.is_empty() {
                self.asked = None;
            }
        }
        if self.asked.is_none() {
            if self.gathering.is_empty() {
                return None;
            }
            let replies = std::mem::take(&mut self.gathering);
            self.asked = Some(Asked {
                numbers: VecDeque::new(),
                at: now,
                replies,
            });
        }
        let asked = self.asked.as_mut()?;
        self.next_ctx += 1;
        asked.at = now;
        asked.numbers.push_back(self.next_ctx);
        if asked.numbers.len() > MAX_ASKED {
            asked.numbers.pop_front();
        }
        Some(self.next_ctx)
    }

    /// When [`Reads::question`] wants to be asked again.
    pub(crate) fn wake_at(&self) -> Option<Now> {
        self.asked.as_ref().map(|asked| asked.at + RETRY)
    }

    /// A quorum answered.
    pub(crate) fn answer(&mut self, ready: ReadReady) {
        if let Some(asked) = self
            .asked
            .take_if(|asked| asked.numbers.contains(&ready.ctx))
        {
            self.confirmed.push_back((ready.index, asked.replies));
        }
    }

    /// The machine has applied this index.
    pub(crate) fn applied(&mut self, applied: u64) {
        // In rising order: each was confirmed after the one before it.
        while let Some((_, replies)) = self.confirmed.pop_front_if(|(index, _)| *index <= applied) {
            self.waiting -= replies.len();
            for reply in replies {
                let _ = reply.send(Ok(applied));
            }
        }
    }
}
