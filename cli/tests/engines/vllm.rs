//! Two vLLM engines and a llama.cpp server behind two balancers, and all that may happen to them.
//!
//! One story, because an engine takes half a minute to start, or three.

use std::time::{Duration, Instant};

use rustix::process::Signal;

use super::client::{Asked, CHAT, Whole, ask, chat};
use super::harness::{Fleet, get, metric, post, within};
use super::real::{Real, before, have};

const SOON: Duration = Duration::from_secs(60);
const MODEL: &str = "tiny";

struct World {
    fleet: Fleet,
    urls: [String; 2],
    /// `w1` and `w2`: the second has a short queue of its own.
    engines: [Real; 2],
    _llama: Real,
}

#[test]
fn real_engines_are_served_and_left_and_their_failures_end_in_types() {
    if !have("vllm") || !have("llama.cpp") {
        return;
    }
    let mut world = World::start();
    world.they_are_known();
    world.they_serve();
    world.errors_are_their_own();
    world.who_leaves_is_forgotten();
    world.an_overloaded_one_sends_its_requests_elsewhere();
    world.a_stopping_one_gets_nothing_more();
    world.one_that_dies_fails_what_ran_on_it();
    world.one_that_freezes_fails_what_ran_on_it();
    world.a_request_that_kills_engines_ends_in_a_type();
}

impl World {
    fn start() -> Self {
        let common = [
            "--shutdown-timeout",
            "25",
            "--max-num-batched-tokens",
            "512",
        ];
        let short = [&common[..], &["--max-num-queued-reqs", "3"]].concat();
        let mut engines = [
            Real::spawn("vllm", &[], &common),
            Real::spawn("vllm", &[], &short),
        ];
        let mut llama = Real::spawn("llama.cpp", &[], &[]);
        llama.until_healthy();
        for engine in &mut engines {
            engine.until_healthy();
        }
        let [first, second] = &engines;
        let stall = ["--engine-stall-ms", "4000"];
        let (fleet, urls) = before(&[first, second, &llama], MODEL, &stall);
        Self {
            fleet,
            urls,
            engines,
            _llama: llama,
        }
    }

    fn ask(&self, text: &str) -> Whole {
        ask(
            &self.urls[text.len() % 2],
            &chat(MODEL, text, text.len().is_multiple_of(3), 6),
        )
    }

    /// Waits until both engines serve.
    fn until_both_serve(&self) {
        for name in ["w1", "w2"] {
            let agent = self.fleet.admin(name);
            within(SOON, "an engine that serves", || {
                (metric(&agent, "forebay_agent_engine_up") > 0.0).then_some(())
            });
        }
    }

    fn they_are_known(&self) {
        let workers = self.fleet.json(&["workers"]);
        for (at, engine) in ["vllm", "vllm", "llama.cpp"].into_iter().enumerate() {
            assert_eq!(workers["workers"][at]["engine"], engine);
        }
        let vllm = &workers["workers"][0];
        // One of its 129 blocks of 32 tokens is never used.
        let kv_tokens = vllm["kv_tokens"].as_u64().unwrap();
        assert!((4_000..=4_128).contains(&kv_tokens), "{kv_tokens}");
        assert_eq!(vllm["max_context_tokens"], 2_048);
        eprintln!(
            "vLLM: {kv_tokens} tokens of cache, renders as {}",
            vllm["labels"]["render-profile"]
        );
        assert_eq!(
            vllm["labels"]["render-profile"],
            workers["workers"][1]["labels"]["render-profile"]
        );
        assert!(
            vllm["labels"]["render-profile"]
                .as_str()
                .unwrap()
                .starts_with("system_tools")
        );
    }

    fn they_serve(&self) {
        let text = "word ".repeat(200);
        for turn in 0..12_usize {
            let stream = turn.is_multiple_of(2);
            let answer = ask(&self.urls[turn / 2 % 2], &chat(MODEL, &text, stream, 6));
            assert!(answer.is_complete(), "{answer:?}");
            assert_eq!(answer.text.contains("[DONE]"), stream);
            assert_eq!(
                answer.text.contains("\"usage\":{"),
                !stream,
                "nobody asked for it in a stream"
            );
        }
        let llama = ask(&self.urls[0], &chat("tiny-llama", &text, true, 6));
        assert!(llama.is_complete(), "{llama:?}");
        let (mut predicted, mut reported) = (0.0, 0.0);
        for name in ["w1", "w2"] {
            let agent = self.fleet.admin(name);
            predicted += metric(&agent, "forebay_agent_cached_tokens_predicted");
            reported += metric(&agent, "forebay_agent_cached_tokens_reported");
            assert!(
                metric(&agent, "forebay_agent_residency_trusted") > 0.0,
                "{name}"
            );
        }
        eprintln!("vLLM: cached tokens predicted {predicted}, reported {reported}");
        assert!(
            reported > 0.0 && predicted <= reported,
            "{predicted} of {reported}"
        );
    }

    fn errors_are_their_own(&self) {
        let long = ask(
            &self.urls[0],
            &chat(MODEL, &"word ".repeat(9_000), false, 1),
        );
        assert_eq!(long.status, 400, "{long:?}");
        assert!(long.text.contains("maximum context length"), "{long:?}");
        let unknown = ask(&self.urls[1], &chat("nope", "x", true, 1));
        assert_eq!(unknown.status, 404, "{unknown:?}");
        let field =
            r#"{"model":"tiny","messages":[{"role":"user","content":"x"}],"temperature":"hot"}"#;
        let field = ask(&self.urls[0], field);
        assert_eq!(field.status, 400, "{field:?}");
    }

    fn running(&self) -> u64 {
        let running = self
            .engines
            .iter()
            .map(|engine| engine.running().unwrap_or(0));
        running.sum()
    }

    fn who_leaves_is_forgotten(&self) {
        let mut took = vec![];
        for turn in 0..6 {
            let mut asked = Asked::of(
                &self.urls[turn % 2],
                CHAT,
                &chat(MODEL, "go on", true, 1_900),
            );
            asked.until_events(3);
            within(SOON, "it runs", || (self.running() == 1).then_some(()));
            took.push(Real::left(&self.engines, asked));
        }
        took.sort();
        eprintln!(
            "vLLM: from leaving to idle, in its metrics (a scrape of both included): {took:.0?}"
        );
        assert!(took[took.len() / 2] < Duration::from_secs(2), "{took:?}");
    }

    fn an_overloaded_one_sends_its_requests_elsewhere(&self) {
        let urls = &self.urls;
        let answers: Vec<Whole> = std::thread::scope(|scope| {
            let asking = |turn: usize| {
                let text = format!("{turn} {}", "word ".repeat(40));
                let url = &urls[turn % 2];
                scope.spawn(move || ask(url, &chat(MODEL, &text, turn.is_multiple_of(3), 200)))
            };
            let asked: Vec<_> = (0..24).map(asking).collect();
            asked
                .into_iter()
                .map(|asked| asked.join().unwrap())
                .collect()
        });
        for answer in &answers {
            assert!(answer.is_complete(), "{answer:?}");
        }
        let refused = metric(
            &self.fleet.admin("w2"),
            "forebay_agent_engine_refused_total",
        );
        eprintln!("vLLM: 24 at once, of which one engine refused {refused}: all were answered");
        assert!(refused > 0.0, "its queue of three was full");
    }

    fn a_stopping_one_gets_nothing_more(&mut self) {
        // Beside Forebay, so that it is known on which engine it runs.
        let mut direct = Asked::of(
            &self.engines[0].url(),
            CHAT,
            &chat(MODEL, "go on", true, 500),
        );
        direct.until_events(3);
        self.engines[0].terminate();
        std::thread::sleep(Duration::from_millis(500));
        let (health, _) = get(&format!("{}/health", self.engines[0].url()));
        let (status, said) = post(
            &format!("{}{CHAT}", self.engines[0].url()),
            &chat(MODEL, "x", false, 1),
        );
        eprintln!(
            "vLLM after SIGTERM: /health {health}, a request {status} {}",
            said.trim()
        );
        for turn in 0..12 {
            let answer = self.ask(&format!("turn {}", "x".repeat(turn)));
            assert!(answer.is_complete(), "{answer:?}");
        }
        let refused = metric(
            &self.fleet.admin("w1"),
            "forebay_agent_engine_refused_total",
        );
        eprintln!("vLLM: the stopping engine refused {refused} of 12, which went elsewhere");
        assert!(
            direct.whole().text.contains("\"finish_reason\":\"length\""),
            "what ran ended well"
        );
        self.engines[0].until_gone(Duration::from_secs(90));
        self.engines[0].spawn_again();
        self.engines[0].until_healthy();
        self.until_both_serve();
    }

    fn one_that_dies_fails_what_ran_on_it(&mut self) {
        let began = || {
            let mut asked = Asked::of(&self.urls[0], CHAT, &chat(MODEL, "go on", true, 1_900));
            asked.until_events(3);
            asked
        };
        let streams = [began(), began(), began()];
        let at = usize::from(self.engines[0].running() == Some(0));
        let (name, before) = (["w1", "w2"][at], self.engines[at].running().unwrap());
        self.engines[at].kill();
        let ends: Vec<Whole> = streams.into_iter().map(Asked::whole).collect();
        let broken = ends.iter().filter(|end| end.is_typed_error()).count();
        assert!(
            ends.iter()
                .all(|end| end.is_typed_error() || end.is_complete()),
            "{ends:?}"
        );
        eprintln!(
            "vLLM: of {before} streams on an engine that was killed, {broken} ended in an error with a type"
        );
        assert_eq!(broken as u64, before);
        for turn in 0..12 {
            let answer = self.ask(&format!("turn {}", "x".repeat(turn)));
            assert!(answer.is_complete(), "{answer:?}");
        }
        self.engines[at].spawn_again();
        self.engines[at].until_healthy();
        self.until_both_serve();
        let resident = metric(&self.fleet.admin(name), "forebay_agent_resident_chunks");
        assert!(
            resident < 1.0,
            "another process has another cache: {resident}"
        );
    }

    fn one_that_freezes_fails_what_ran_on_it(&self) {
        let mut asked = Asked::of(&self.urls[1], CHAT, &chat(MODEL, "go on", true, 1_900));
        asked.until_events(3);
        let at = usize::from(self.engines[0].running() == Some(0));
        self.engines[at].signal(Signal::STOP);
        let frozen = Instant::now();
        let broken = asked.whole();
        eprintln!(
            "vLLM: from SIGSTOP to an end with a type {:.1?}",
            frozen.elapsed()
        );
        assert!(broken.is_typed_error(), "{broken:?}");
        for turn in 0..12 {
            let answer = self.ask(&format!("turn {}", "x".repeat(turn)));
            assert!(answer.is_complete(), "{answer:?}");
        }
        self.engines[at].signal(Signal::CONT);
        self.until_both_serve();
    }

    /// This build of vLLM dies of a seed and a prompt that it prefills in chunks.
    fn a_request_that_kills_engines_ends_in_a_type(&mut self) {
        let mut bystander = Asked::of(&self.urls[0], CHAT, &chat(MODEL, "go on", true, 400));
        bystander.until_events(1);
        let poison = serde_json::json!({
            "model": MODEL, "seed": 7, "max_tokens": 4, "temperature": 0.7,
            "messages": [{"role": "user", "content": "poison ".repeat(230)}],
        });
        let began = Instant::now();
        let end = ask(&self.urls[1], &poison.to_string());
        eprintln!(
            "vLLM: the request that kills it ended after {:.1?} with {} {:.120}",
            began.elapsed(),
            end.status,
            end.text
        );
        assert!(end.is_typed_error() || end.is_complete(), "{end:?}");
        let bystander = bystander.whole();
        assert!(
            bystander.is_typed_error() || bystander.is_complete(),
            "{bystander:?}"
        );
        let after = self.ask("what is left answers, or says that there is nothing");
        assert!(after.is_complete() || after.is_typed_error(), "{after:?}");
        let mut died = 0;
        for engine in &mut self.engines {
            // A process in front of a dead engine is gone in a moment.
            std::thread::sleep(Duration::from_secs(5));
            if !engine.is_healthy() {
                died += 1;
                engine.spawn_again();
            }
        }
        eprintln!("vLLM: {died} of two engines died of it");
        assert!(died > 0, "this request kills no engine: {end:?}");
        if died == 2 {
            assert_eq!(end.status, 422, "{end:?}");
        }
        for engine in &mut self.engines {
            engine.until_healthy();
        }
        self.until_both_serve();
        let answer = self.ask("and now it is well");
        assert!(answer.is_complete(), "{answer:?}");
        if died == 2 {
            let again = ask(&self.urls[1], &poison.to_string());
            assert_eq!(again.status, 422, "two engines died of it: {again:?}");
        }
    }
}
