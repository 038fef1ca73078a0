//! Questions to agents: asked after a refusal, answered in two milliseconds or not at all.
#![allow(clippy::disallowed_methods)] // the rim: this is where time passes

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use forebay_link::Link;
use forebay_proto::WorkerId;
use forebay_proto::frame::{Frame, Kind};
use forebay_proto::wire::work;
use forebay_scheduler::asking::{PATIENCE, sample};
use parking_lot::Mutex;
use tokio::sync::mpsc;
use tokio::time::{Instant, timeout_at};

use crate::core::dispatch::{Answer, Ask};
use crate::exchange::Exchange;
use crate::shared::Shared;

/// Questions that wait for answers: one a request that was refused, at most.
#[derive(Default)]
pub(crate) struct Questions {
    newest: AtomicU64,
    open: Mutex<HashMap<u64, Awaited>>,
}

/// Whose answers one question waits for: each is heard once.
struct Awaited {
    from: Vec<WorkerId>,
    tell: mpsc::Sender<Answer>,
}

/// One question, closed when dropped.
struct Open<'a> {
    questions: &'a Questions,
    id: u64,
    /// Room for one of each that was asked.
    answers: mpsc::Receiver<Answer>,
}

impl Questions {
    fn open(&self, asked: impl IntoIterator<Item = WorkerId>) -> Open<'_> {
        let id = self.newest.fetch_add(1, Ordering::Relaxed) + 1;
        let from: Vec<WorkerId> = asked.into_iter().collect();
        let (tell, answers) = mpsc::channel(from.len().max(1));
        self.open.lock().insert(id, Awaited { from, tell });
        Open {
            questions: self,
            id,
            answers,
        }
    }

    /// Passes on what an asked worker says first; what others say, or it says again, is nobody's.
    fn answered(&self, id: u64, answer: Answer) {
        let mut open = self.open.lock();
        let Some(Awaited { from, tell }) = open.get_mut(&id) else {
            return;
        };
        if let Some(at) = from.iter().position(|worker| *worker == answer.0) {
            from.swap_remove(at);
            // Whoever waited may have left just now.
            let _ = tell.try_send(answer);
        }
    }
}

impl Drop for Open<'_> {
    fn drop(&mut self) {
        self.questions.open.lock().remove(&self.id);
    }
}

impl Shared {
    /// Takes a worker's answer: its state, whoever asked, and what it has of the prompt for who still waits.
    pub(crate) fn quoted(self: &Arc<Self>, quote: &work::Quote, worker: WorkerId) {
        if let Some(load) = &quote.load {
            self.hear(load, worker);
        }
        let answer = (worker, quote.cached_tokens);
        self.questions.answered(quote.id, answer);
    }
}

impl Exchange {
    /// Asks the best few workers, as they seem, what the request would meet; those that answer in time.
    pub(crate) async fn ask_around(&self, ask: &Ask) -> Vec<Answer> {
        let now = self.shared.now();
        let best: Vec<(WorkerId, Link)> = self.shared.dispatch().best(now, ask);
        if best.is_empty() {
            return Vec::new();
        }
        let mut open = self
            .shared
            .questions
            .open(best.iter().map(|(worker, _)| *worker));
        let question = work::Question {
            id: open.id,
            #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)] // it saturates
            prompt_tokens: ask.sought.prompt_tokens as u32,
            chunks: sample(&self.prompt.chunks, &ask.sought.hits),
        };
        let frame = Frame::message(Kind::Question, &question);
        for (_, link) in &best {
            // One that is lost is not answered.
            let _ = link.send_datagram(&frame);
        }
        let until = Instant::now() + PATIENCE;
        let mut answers: Vec<Answer> = Vec::with_capacity(best.len());
        while answers.len() < best.len() {
            match timeout_at(until, open.answers.recv()).await {
                Ok(Some(answer)) => answers.push(answer),
                Ok(None) | Err(_) => break,
            }
        }
        self.shared.metrics.asked(best.len(), answers.len());
        answers
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_question_that_is_given_up_is_forgotten_and_its_late_answers_are_nobodys() {
        let questions = Questions::default();
        let asked = [WorkerId(1), WorkerId(2)];
        let (first, mut second) = (questions.open(asked), questions.open(asked));
        let late = first.id;
        questions.answered(late, (WorkerId(1), 5));
        drop(first);
        assert_eq!(questions.open.lock().len(), 1);
        questions.answered(late, (WorkerId(1), 6));
        assert!(second.answers.try_recv().is_err());
        questions.answered(second.id, (WorkerId(2), 7));
        assert_eq!(second.answers.try_recv(), Ok((WorkerId(2), 7)));
        drop(second);
        assert!(questions.open.lock().is_empty());
    }

    #[test]
    fn each_worker_that_was_asked_is_heard_once_and_nobody_else() {
        let questions = Questions::default();
        let mut open = questions.open([WorkerId(1), WorkerId(2)]);
        for tokens in 0..1_000 {
            questions.answered(open.id, (WorkerId(1), tokens));
            questions.answered(open.id, (WorkerId(3), tokens));
        }
        assert_eq!(open.answers.len(), 1);
        questions.answered(open.id, (WorkerId(2), 7));
        assert_eq!(open.answers.try_recv(), Ok((WorkerId(1), 0)));
        assert_eq!(open.answers.try_recv(), Ok((WorkerId(2), 7)));
        assert!(open.answers.try_recv().is_err());
    }
}
