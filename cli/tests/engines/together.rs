//! Two vLLM engines whose events are followed and a llama.cpp server behind two balancers, in operation:
//! several clients at once, some of whom leave or ask for what cannot be, and three times as much to
//! remember as the caches hold.

use std::time::{Duration, Instant};

use super::chats::{Chats, Predictions, Shape};
use super::client::{Asked, CHAT, Whole, ask, chat};
use super::harness::{Fleet, metric, within};
use super::real::{Real, before, cut_finer, have};

/// Of 32 tokens, in each vLLM; one is reserved.
const BLOCKS: u64 = 901;
const MODEL: &str = "tiny";
const LLAMA: &str = "tiny-llama";
const SOON: Duration = Duration::from_secs(60);
/// Clients of the vLLM engines, the conversations of each, and how much each asks.
const CLIENTS: u64 = 4;
const OPEN: usize = 130;
const TURNS: usize = 330;
/// Of the llama.cpp server's client: a conversation for each of its slots, each with a beginning of its own.
/// Those that share one overwrite each other in one slot.
const LLAMA_OPEN: usize = 4;
const LLAMA_TURNS: usize = 120;

struct World {
    fleet: Fleet,
    urls: [String; 2],
    engines: [Real; 2],
    _llama: Real,
    _sockets: [tempfile::TempDir; 2],
}

#[test]
fn real_engines_together_have_what_was_predicted() {
    if !have("vllm") || !have("llama.cpp") {
        return;
    }
    let world = World::start();
    let before = Instant::now();
    world.conversations();
    eprintln!("conversations took {:.0?}", before.elapsed());
    world.grades_are_as_stated();
    world.who_leaves_is_forgotten();
    world.errors_are_their_own();
    world.too_many_at_once_are_answered_or_told();
    world.grades_are_as_stated();
}

impl World {
    fn start() -> Self {
        let sockets = [(); 2].map(|()| tempfile::tempdir().unwrap());
        // The second has a short queue of its own.
        let short = ["--max-num-queued-reqs", "3"];
        let mut engines = [
            Real::spawn_telling(BLOCKS, sockets[0].path(), &[]),
            Real::spawn_telling(BLOCKS, sockets[1].path(), &short),
        ];
        let mut llama = Real::spawn("llama.cpp", &[], &[]);
        llama.until_healthy();
        for engine in &mut engines {
            engine.until_healthy();
        }
        let [first, second] = &engines;
        let (fleet, urls) = before(&[first, second, &llama], MODEL, &[]);
        cut_finer(&fleet);
        let world = Self {
            fleet,
            urls,
            engines,
            _llama: llama,
            _sockets: sockets,
        };
        within(SOON, "grade exact, and served", || {
            let exact = world.agents().iter().all(|admin| is_exact(admin));
            let serves = |model| ask(&world.urls[0], &chat(model, "a", false, 1)).is_complete();
            (exact && serves(MODEL) && serves(LLAMA)).then_some(())
        });
        world
    }

    /// Before the vLLM engines.
    fn agents(&self) -> [String; 2] {
        ["w1", "w2"].map(|name| self.fleet.admin(name))
    }

    fn conversations(&self) {
        // Whoever shares an application's key may keep its customers apart.
        let shape = Shape::new(MODEL, 300, 8).scoped(&["blue", "green"]);
        let mut all: Vec<Chats> = (0..CLIENTS)
            .map(|client| Chats::new(client, &shape, OPEN))
            .collect();
        let llama = Shape::new(LLAMA, 300, 8);
        let mut beside = Chats::new(CLIENTS, &llama, LLAMA_OPEN);
        std::thread::scope(|scope| {
            for chats in &mut all {
                scope.spawn(|| self.client(chats, TURNS));
            }
            scope.spawn(|| (0..LLAMA_TURNS).for_each(|turn| beside.turn(&self.urls[turn % 2])));
        });
        let begun: usize = all.iter().map(|chats| chats.begun).sum();
        let answers: usize = all.iter().map(|chats| chats.answers).sum();
        let (needed, room) = (
            Chats::working_set_tokens(&all),
            2.0 * 32.0 * (BLOCKS - 1) as f64,
        );
        let agents = self.agents();
        let evicted = agents
            .each_ref()
            .map(|admin| metric(admin, "forebay_agent_kv_absent_chunks"));
        eprintln!(
            "{begun} conversations, {answers} answers, {:.1} times what the caches hold, {evicted:?} evicted chunks known",
            needed / room
        );
        assert!(begun >= 500, "{begun}");
        assert!(needed >= 3.0 * room, "{needed} tokens in {room}");
        assert!(
            evicted.iter().all(|evicted| *evicted > 200.0),
            "{evicted:?}"
        );
        for (name, admin) in ["w1", "w2"].iter().zip(&agents) {
            Predictions::of(std::slice::from_ref(admin)).hold(name, 0.95);
            let seen = |name: &str| metric(admin, &format!("forebay_agent_{name}"));
            let missed = seen("kv_gaps") + seen("kv_losses") + seen("kv_unknown_removals");
            assert_eq!(missed + seen("unaligned_prompts"), 0.0, "{name}");
        }
        let both = Predictions::of(&agents);
        both.hold("both", 0.95);
        assert!(both.answers() >= 0.9 * answers as f64, "{both:?}");
    }

    fn client(&self, chats: &mut Chats, turns: usize) {
        for turn in 0..turns {
            let url = &self.urls[turn % 2];
            match turn % 40 {
                13 => chats.leave(url),
                27 => assert_eq!(ask(url, &nonsense()).status, 400),
                _ => chats.turn(url),
            }
        }
    }

    fn grades_are_as_stated(&self) {
        for admin in self.agents() {
            assert!(is_exact(&admin));
        }
        let llama = self.fleet.admin("w3");
        assert!(!is_exact(&llama));
        let seen = |name: &str| metric(&llama, &format!("forebay_agent_{name}"));
        assert!(seen("residency_trusted") > 0.0, "inferred, and it holds");
        eprintln!(
            "llama.cpp: cached tokens predicted {}, reported {}",
            seen("cached_tokens_predicted"),
            seen("cached_tokens_reported")
        );
    }

    fn who_leaves_is_forgotten(&self) {
        let leaving = |turn: usize| {
            let body = chat(MODEL, "go on", true, 1_900);
            let mut asked = Asked::of(&self.urls[turn % 2], CHAT, &body);
            asked.until_events(3);
            Real::left(&self.engines, asked)
        };
        let mut took: Vec<Duration> = (0..10).map(leaving).collect();
        took.sort();
        eprintln!(
            "from leaving to idle, in the engines' metrics (a scrape of both included): {took:.0?}"
        );
        assert!(took[took.len() / 2] < Duration::from_secs(2), "{took:?}");
    }

    fn errors_are_their_own(&self) {
        let long = chat(MODEL, &"word ".repeat(9_000), true, 1);
        let long = ask(&self.urls[0], &long);
        assert_eq!(long.status, 400, "{long:?}");
        assert!(long.text.contains("maximum context length"), "{long:?}");
        for (model, status) in [("nope", 404), (MODEL, 200), (LLAMA, 200)] {
            let answer = ask(&self.urls[1], &chat(model, "x", false, 1));
            assert_eq!(answer.status, status, "{answer:?}");
        }
        let nonsense = ask(&self.urls[1], &nonsense());
        assert_eq!(nonsense.status, 400, "{nonsense:?}");
        assert!(nonsense.is_typed_error(), "{nonsense:?}");
    }

    fn too_many_at_once_are_answered_or_told(&self) {
        let refused = || metric(&self.agents()[1], "forebay_agent_engine_refused_total");
        let refused_before = refused();
        let answers: Vec<Whole> = std::thread::scope(|scope| {
            let asking = |turn: usize| {
                let text = format!("{turn} {}", "word ".repeat(40));
                let url = &self.urls[turn % 2];
                scope.spawn(move || ask(url, &chat(MODEL, &text, turn.is_multiple_of(3), 150)))
            };
            let asked: Vec<_> = (0..48).map(asking).collect();
            let answers = asked.into_iter();
            answers.map(|asked| asked.join().unwrap()).collect()
        });
        let answered = answers.iter().filter(|answer| answer.is_complete()).count();
        for answer in &answers {
            let told = answer.is_typed_error() && answer.status == 429;
            assert!(answer.is_complete() || told, "{answer:?}");
        }
        let refused = refused() - refused_before;
        eprintln!("48 at once: {answered} answered, the short queue refused {refused}");
        assert!(answered >= 32, "there is room for more than these");
        assert!(refused > 0.0, "its queue of three was full");
    }
}

fn is_exact(admin: &str) -> bool {
    metric(admin, "forebay_agent_residency_exact") == 1.0
}

/// What the engine refuses.
fn nonsense() -> String {
    serde_json::json!({
        "model": MODEL, "temperature": "hot", "messages": [{"role": "user", "content": "x"}],
    })
    .to_string()
}
