//! vLLM engines whose events are followed, and agents beside them, that freeze, die and are killed by a request:
//! what is believed of their caches afterwards is right.

use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

use super::chats::{Chats, Predictions, Shape};
use super::client::{Asked, CHAT, ask, chat};
use super::harness::{Fleet, metric, post, within};
use super::real::{Real, before, cut_finer, have};

const MODEL: &str = "tiny";
const NAMES: [&str; 2] = ["w1", "w2"];
/// Of 32 tokens, in each engine; one is reserved.
const BLOCKS: u64 = 401;
const SOON: Duration = Duration::from_secs(60);
/// Longer than from one writing of the map to the next.
const KEPT: Duration = Duration::from_secs(6);

struct World {
    fleet: Fleet,
    urls: [String; 2],
    engines: [Real; 2],
    chats: Chats,
    _sockets: [tempfile::TempDir; 2],
}

#[test]
fn what_is_believed_of_a_cache_outlives_every_fault_but_the_engines_own() {
    if !have("vllm") {
        return;
    }
    let mut world = World::start();
    for name in NAMES {
        world.predicts_on(name, "before any fault", 40);
    }
    world.a_frozen_engine_goes_on_where_it_was();
    world.a_frozen_agent_catches_up();
    world.a_dead_agent_comes_back_to_its_map();
    world.what_a_request_killed_is_not_believed();
}

impl World {
    fn start() -> Self {
        let sockets = NAMES.map(|_| tempfile::tempdir().unwrap());
        // A prompt of more tokens is prefilled in chunks.
        let flags = ["--max-num-batched-tokens", "512"];
        let mut engines =
            [0, 1].map(|at: usize| Real::spawn_telling(BLOCKS, sockets[at].path(), &flags));
        for engine in &mut engines {
            engine.until_healthy();
        }
        let [first, second] = &engines;
        let (fleet, urls) = before(&[first, second], MODEL, &["--engine-stall-ms", "4000"]);
        cut_finer(&fleet);
        let world = Self {
            fleet,
            urls,
            engines,
            chats: Chats::new(3, &Shape::new(MODEL, 300, 8), 40),
            _sockets: sockets,
        };
        NAMES.iter().for_each(|name| world.until_exact(name));
        within(SOON, "served", || {
            let answer = ask(&world.urls[0], &chat(MODEL, "a", false, 1));
            answer.is_complete().then_some(())
        });
        world
    }

    fn seen(&self, name: &str, what: &str) -> f64 {
        metric(&self.fleet.admin(name), &format!("forebay_agent_{what}"))
    }

    fn until_exact(&self, name: &str) {
        within(SOON, "up and exact", || {
            let admin = self.fleet.admin(name);
            let host = admin.strip_prefix("http://").unwrap();
            std::net::TcpStream::connect(host).ok()?;
            let up = self.seen(name, "engine_up") > 0.0;
            (up && self.seen(name, "residency_exact") == 1.0).then_some(())
        });
    }

    fn verb(&self, verb: &str, worker: &str) {
        let mut said = vec![verb, worker, "--yes", "--reason", "a test"];
        if verb == "cordon" {
            said.push("--ignore-capacity-guard");
        }
        let done = self.fleet.run(&said);
        assert!(done.status.success(), "{done:?}");
    }

    /// Conversations go on, on this worker alone: nothing is found to be missing that was predicted.
    fn predicts_on(&mut self, name: &str, when: &str, turns: usize) {
        let other = NAMES[usize::from(name == NAMES[0])];
        self.until_exact(name);
        self.verb("cordon", other);
        let agents = [self.fleet.admin(name)];
        within(SOON, "it is placed on", || {
            let answer = ask(&self.urls[0], &chat(MODEL, "a", false, 1));
            answer.is_complete().then_some(())
        });
        let before = Predictions::of(&agents);
        for turn in 0..turns {
            self.chats.turn(&self.urls[turn % 2]);
        }
        let since = Predictions::of(&agents).since(before);
        self.verb("uncordon", other);
        eprintln!(
            "{name}, {when}: {} answers, {} + {} over, predicted / reported {:.4}",
            since.answers(),
            since.settled.over,
            since.promised.over,
            since.ratio()
        );
        assert!(since.answers() >= 0.9 * turns as f64, "{since:?}");
        assert_eq!(since.settled.over, 0.0, "{since:?}");
        assert!(since.promised.over <= 1.0, "{since:?}");
        assert!(since.ratio() >= 0.85, "{since:?}");
    }

    /// A stream that runs, and on which of the two.
    fn streaming(&self) -> (Asked, usize) {
        let mut asked = Asked::of(&self.urls[1], CHAT, &chat(MODEL, "go on", true, 1_900));
        asked.until_events(3);
        (asked, usize::from(self.engines[0].running() == Some(0)))
    }

    /// Somebody uses the engine beside the agent: its cache changes.
    fn used_beside(&self, at: usize) {
        let url = format!("{}/v1/completions", self.engines[at].url());
        for prompt in 0..6 {
            let text = format!("{prompt} beside ").repeat(120);
            let body = serde_json::json!({"model": MODEL, "max_tokens": 1, "prompt": text});
            assert_eq!(post(&url, &body.to_string()).0, 200);
        }
    }

    fn others_are_served(&mut self) {
        (0..12).for_each(|turn| self.chats.turn(&self.urls[turn % 2]));
    }

    fn a_frozen_engine_goes_on_where_it_was(&mut self) {
        let (asked, at) = self.streaming();
        self.engines[at].signal(Signal::STOP);
        let frozen = Instant::now();
        let broken = asked.whole();
        eprintln!(
            "SIGSTOP of an engine: a typed end after {:.1?}",
            frozen.elapsed()
        );
        assert!(broken.is_typed_error(), "{broken:?}");
        self.others_are_served();
        self.engines[at].signal(Signal::CONT);
        let name = NAMES[at];
        self.until_exact(name);
        let resident = self.seen(name, "resident_chunks");
        assert!(resident > 50.0, "the process is the same: {resident}");
        self.predicts_on(name, "after its engine was frozen", 40);
    }

    fn a_frozen_agent_catches_up(&mut self) {
        let (asked, at) = self.streaming();
        let name = NAMES[at];
        let agent = Pid::from_raw(self.fleet.process(name).pid).unwrap();
        kill_process(agent, Signal::STOP).unwrap();
        let frozen = Instant::now();
        self.used_beside(at);
        let broken = asked.whole();
        eprintln!(
            "SIGSTOP of an agent: a typed end after {:.1?}",
            frozen.elapsed()
        );
        assert!(broken.is_typed_error(), "{broken:?}");
        self.others_are_served();
        kill_process(agent, Signal::CONT).unwrap();
        within(SOON, "the engine was left", || {
            (self.engines[at].running() == Some(0)).then_some(())
        });
        self.predicts_on(name, "after its agent was frozen", 40);
        assert_eq!(self.seen(name, "kv_losses"), 0.0);
    }

    fn a_dead_agent_comes_back_to_its_map(&mut self) {
        std::thread::sleep(KEPT);
        let (asked, at) = self.streaming();
        let name = NAMES[at];
        self.fleet.kill(name);
        let broken = asked.whole();
        assert!(broken.is_typed_error(), "{broken:?}");
        within(SOON, "the engine was left", || {
            (self.engines[at].running() == Some(0)).then_some(())
        });
        self.used_beside(at);
        self.others_are_served();
        self.fleet.start_again(&[name]);
        self.until_exact(name);
        let resident = self.seen(name, "resident_chunks");
        assert!(resident > 50.0, "the map goes on: {resident}");
        self.predicts_on(name, "after its agent was killed", 40);
    }

    /// This build of vLLM dies of a seed and a prompt that it prefills in chunks.
    fn what_a_request_killed_is_not_believed(&mut self) {
        let bystander = self.streaming().0;
        let poison = serde_json::json!({
            "model": MODEL, "seed": 7, "max_tokens": 4, "temperature": 0.7,
            "messages": [{"role": "user", "content": "poison ".repeat(230)}],
        });
        let end = ask(&self.urls[1], &poison.to_string());
        assert!(end.is_typed_error() || end.is_complete(), "{end:?}");
        let bystander = bystander.whole();
        assert!(
            bystander.is_typed_error() || bystander.is_complete(),
            "{bystander:?}"
        );
        let mut died = vec![];
        for (engine, name) in self.engines.iter_mut().zip(NAMES) {
            // A process in front of a dead engine is gone in a moment.
            std::thread::sleep(Duration::from_secs(5));
            if !engine.is_healthy() {
                died.push(name);
                engine.spawn_again();
            }
        }
        eprintln!(
            "the request that kills engines ended with {}; it killed {died:?}",
            end.status
        );
        assert!(!died.is_empty(), "this request kills no engine: {end:?}");
        for engine in &mut self.engines {
            engine.until_healthy();
        }
        for name in died {
            self.until_exact(name);
            let resident = self.seen(name, "resident_chunks");
            assert!(
                resident <= 1.0,
                "another process has another cache: {resident}"
            );
            self.predicts_on(name, "after a request killed its engine", 40);
        }
    }
}
