//! Conversations on a few shared beginnings, which grow, end and begin anew, and how well agents predicted
//! what engines had of them.

use std::collections::VecDeque;
use std::sync::Arc;

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use super::client::{Asked, CHAT, ask};
use super::harness::metric;

const WORDS: [&str; 16] = [
    "the",
    "cache",
    "block",
    "token",
    "prefix",
    "chat",
    "turn",
    "system",
    "user",
    "answer",
    "careful",
    "assistant",
    "counts",
    "bytes",
    "engine",
    "worker",
];
/// Conversations that somebody is in the middle of.
const RECENT: usize = 6;

/// A text of so many words.
pub fn words(rng: &mut StdRng, count: usize) -> String {
    let word = |rng: &mut StdRng| WORDS[rng.random_range(0..WORDS.len())];
    (0..count).map(|_| word(rng)).collect::<Vec<_>>().join(" ")
}

/// What conversations are like.
#[derive(Clone, Debug)]
pub struct Shape {
    pub model: &'static str,
    /// Who shares a beginning with whom within an isolation scope; several scopes have the same ones.
    pub beginnings: Arc<[String]>,
    /// Of the client's own making, within its tenant's.
    pub scopes: &'static [&'static str],
    /// Messages at which one ends.
    pub messages: usize,
}

impl Shape {
    /// Four beginnings of so many words.
    pub fn new(model: &'static str, beginning_words: usize, messages: usize) -> Self {
        let mut rng = StdRng::seed_from_u64(1);
        Self {
            model,
            beginnings: (0..4).map(|_| words(&mut rng, beginning_words)).collect(),
            scopes: &[],
            messages,
        }
    }

    /// The same in these isolation scopes.
    pub fn scoped(self, scopes: &'static [&'static str]) -> Self {
        Self { scopes, ..self }
    }
}

#[derive(Clone)]
struct Chat {
    messages: Vec<serde_json::Value>,
    scope: Option<&'static str>,
    own_bytes: usize,
}

/// The conversations of one client.
pub struct Chats {
    rng: StdRng,
    shape: Shape,
    open: Vec<Chat>,
    recent: VecDeque<usize>,
    next: usize,
    /// Tokens that engines counted of prompts, and the bytes of those.
    counted: (u64, u64),
    /// Answers so far.
    pub answers: usize,
    /// Conversations of which something was asked.
    pub begun: usize,
}

impl Chats {
    pub fn new(seed: u64, shape: &Shape, open: usize) -> Self {
        let mut chats = Self {
            rng: StdRng::seed_from_u64(seed),
            shape: shape.clone(),
            open: Vec::new(),
            recent: VecDeque::new(),
            next: 0,
            counted: (0, 0),
            answers: 0,
            begun: 0,
        };
        for at in 0..open {
            let chat = chats.begin(at);
            chats.open.push(chat);
        }
        chats
    }

    /// Each has its place's beginning.
    fn begin(&mut self, at: usize) -> Chat {
        let Shape {
            beginnings, scopes, ..
        } = &self.shape;
        let beginning = &beginnings[at % beginnings.len()];
        let scope = scopes.get(self.rng.random_range(0..scopes.len().max(1)));
        let question = words(&mut self.rng, 150);
        Chat {
            scope: scope.copied(),
            own_bytes: question.len(),
            messages: vec![
                serde_json::json!({"role": "system", "content": beginning}),
                serde_json::json!({"role": "user", "content": question}),
            ],
        }
    }

    /// Every second time one that was asked lately, else the one that was not for longest.
    fn pick(&mut self) -> usize {
        if !self.recent.is_empty() && self.rng.random() {
            return self.recent[self.rng.random_range(0..self.recent.len())];
        }
        let at = self.next;
        self.next = (at + 1) % self.open.len();
        self.recent.retain(|other| *other != at);
        self.recent.push_back(at);
        if self.recent.len() > RECENT {
            self.recent.pop_front();
        }
        at
    }

    fn body(&self, at: usize, stream: bool, max_tokens: u32) -> String {
        let Chat {
            messages, scope, ..
        } = &self.open[at];
        let mut body = serde_json::json!({
            "model": self.shape.model, "max_tokens": max_tokens, "temperature": 0,
            "stream": stream, "messages": messages,
        });
        if let Some(scope) = scope {
            body["cache_salt"] = (*scope).into();
        }
        body.to_string()
    }

    /// One more turn of one of them; the streamed ones and the others alike.
    pub fn turn(&mut self, url: &str) {
        let at = self.pick();
        let stream: bool = self.rng.random();
        let max_tokens = self.rng.random_range(1..8);
        let answer = ask(url, &self.body(at, stream, max_tokens));
        assert!(answer.is_complete(), "{answer:?}");
        assert_eq!(answer.text.contains("[DONE]"), stream);
        assert!(
            !answer.text.contains("token_ids\":["),
            "ids were asked for by nobody else: {answer:?}"
        );
        self.answers += 1;
        let counted = answer.text.split("\"prompt_tokens\":").nth(1);
        let counted = counted.and_then(|rest| rest.split(|c: char| !c.is_ascii_digit()).next());
        if let Some(tokens) = counted.and_then(|tokens| tokens.parse::<u64>().ok()) {
            let bytes = |message: &serde_json::Value| message["content"].as_str().unwrap().len();
            self.counted.0 += tokens;
            self.counted.1 += self.open[at].messages.iter().map(bytes).sum::<usize>() as u64;
        }
        self.begun += usize::from(self.open[at].messages.len() == 2);
        if self.open[at].messages.len() >= self.shape.messages {
            self.open[at] = self.begin(at);
            return;
        }
        let (said, asked) = (words(&mut self.rng, 8), words(&mut self.rng, 60));
        let chat = &mut self.open[at];
        chat.own_bytes += said.len() + asked.len();
        for (role, content) in [("assistant", said), ("user", asked)] {
            let message = serde_json::json!({"role": role, "content": content});
            chat.messages.push(message);
        }
    }

    /// Asks for a long answer and leaves in the middle of it.
    pub fn leave(&mut self, url: &str) {
        let at = self.pick();
        let body = self.body(at, true, 400);
        let mut asked = Asked::of(url, CHAT, &body);
        asked.until_events(3);
    }

    /// Tokens of all that may be asked again.
    pub fn working_set_tokens(all: &[Self]) -> f64 {
        let shape = &all[0].shape;
        let shared: usize = shape.beginnings.iter().map(String::len).sum();
        let own = all.iter().flat_map(|chats| &chats.open);
        let own: usize = own.map(|chat| chat.own_bytes).sum();
        let counted =
            |sum: (u64, u64), chats: &Self| (sum.0 + chats.counted.0, sum.1 + chats.counted.1);
        let (tokens, bytes) = all.iter().fold((0, 0), counted);
        (shared * shape.scopes.len().max(1) + own) as f64 * tokens as f64 / bytes as f64
    }
}

/// What was predicted by events: where all were in, and of all other requests.
#[derive(Clone, Copy, Debug, Default)]
pub struct Judged {
    pub answers: f64,
    /// By more than a block.
    pub over: f64,
    pub predicted: f64,
    pub reported: f64,
}

/// How well agents that follow events predicted.
#[derive(Clone, Copy, Debug, Default)]
pub struct Predictions {
    pub settled: Judged,
    pub promised: Judged,
}

impl Predictions {
    /// Of all of these agents, since their starts.
    pub fn of(agents: &[String]) -> Self {
        let sum = |how: &str, what: &str| -> f64 {
            let name = format!("forebay_agent_kv_{how}_{what}");
            agents.iter().map(|admin| metric(admin, &name)).sum()
        };
        let judged = |how: &str| Judged {
            answers: sum(how, "answers"),
            over: sum(how, "over"),
            predicted: sum(how, "predicted_tokens"),
            reported: sum(how, "reported_tokens"),
        };
        Self {
            settled: judged("settled"),
            promised: judged("promised"),
        }
    }

    /// What came since.
    pub fn since(self, before: Self) -> Self {
        let less = |now: Judged, before: Judged| Judged {
            answers: now.answers - before.answers,
            over: now.over - before.over,
            predicted: now.predicted - before.predicted,
            reported: now.reported - before.reported,
        };
        Self {
            settled: less(self.settled, before.settled),
            promised: less(self.promised, before.promised),
        }
    }

    pub fn answers(&self) -> f64 {
        self.settled.answers + self.promised.answers
    }

    /// Predicted tokens to reported ones, in sum.
    pub fn ratio(&self) -> f64 {
        (self.settled.predicted + self.promised.predicted)
            / (self.settled.reported + self.promised.reported)
    }

    /// Says how they held, which they did; of what was reported at least this share was predicted.
    pub fn hold(&self, when: &str, least: f64) {
        let Self { settled, promised } = self;
        eprintln!(
            "{when}: {} answers whose events were in, {} over by more than a block, predicted / reported {:.4}; \
             {} others, {} over ({:.2} % of all); in all {:.4}; {:.0} tokens cached in the mean",
            settled.answers,
            settled.over,
            settled.predicted / settled.reported,
            promised.answers,
            promised.over,
            100.0 * promised.over / self.answers(),
            self.ratio(),
            (settled.reported + promised.reported) / self.answers(),
        );
        assert!(self.ratio() >= least, "{self:?}");
        assert!(settled.over <= 0.001 * settled.answers, "{self:?}");
        assert!(promised.over <= 0.02 * self.answers(), "{self:?}");
    }
}
