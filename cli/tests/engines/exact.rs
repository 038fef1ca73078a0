//! A real vLLM behind an agent that follows its cache's events: what is predicted is what it finds.

use std::time::Duration;

use rand::SeedableRng;
use rand::rngs::StdRng;

use super::chats::{Chats, Predictions, Shape, words};
use super::client::{ask, chat};
use super::harness::{Fleet, metric, post, within};
use super::real::{Real, cut_finer, have};

/// Room for ten requests.
const BLOCKS: u64 = 401;
const SOON: Duration = Duration::from_secs(60);
const MODEL: &str = "tiny";

/// A worker whose engine publishes its cache's events.
struct World {
    fleet: Fleet,
    engine: Real,
    chats: Chats,
    _sockets: tempfile::TempDir,
}

#[test]
fn a_real_vllm_has_what_its_events_say() {
    if !have("vllm") {
        return;
    }
    let mut world = World::start();
    world.until_exact("grade exact");
    world.turns(350);
    assert!(world.report("one client", Predictions::default(), 0.95) >= 300.0);
    world.several_at_once(2);
    world.several_at_once(4);
    assert!(
        world.seen("kv_absent_chunks") > 100.0,
        "there were evictions"
    );
    world.a_map_outlives_its_agent();
    world.and_not_its_engine();
}

impl World {
    fn start() -> Self {
        let sockets = tempfile::tempdir().unwrap();
        let mut engine = Real::spawn_telling(BLOCKS, sockets.path(), &[]);
        engine.until_healthy();
        let fleet = Fleet::start(&["--model", MODEL, "--engine", &engine.url()]);
        cut_finer(&fleet);
        Self {
            fleet,
            engine,
            // With 350 tokens and more of their own each: three times the cache.
            chats: Chats::new(5, &Shape::new(MODEL, 300, 8), 100),
            _sockets: sockets,
        }
    }

    fn seen(&self, name: &str) -> f64 {
        metric(&self.fleet.admin("w1"), &format!("forebay_agent_{name}"))
    }

    fn is_exact(&self) -> bool {
        let admin = self.fleet.admin("w1");
        let up = std::net::TcpStream::connect(admin.strip_prefix("http://").unwrap()).is_ok();
        up && self.seen("residency_exact") == 1.0
    }

    /// Waits until everything in the cache is known, and the worker is placed on.
    fn until_exact(&self, what: &str) {
        within(SOON, what, || self.is_exact().then_some(()));
        within(SOON, "served", || {
            let answer = ask(&self.fleet.url, &chat(MODEL, "a", false, 1));
            answer.is_complete().then_some(())
        });
    }

    fn turns(&mut self, count: usize) {
        (0..count).for_each(|_| self.chats.turn(&self.fleet.url));
    }

    fn predictions(&self) -> Predictions {
        Predictions::of(&[self.fleet.admin("w1")])
    }

    /// Says how predictions held since then, which they did: of what was found at least this share was predicted.
    /// Returns the answers that told.
    fn report(&self, when: &str, before: Predictions, least: f64) -> f64 {
        let since = self.predictions().since(before);
        since.hold(when, least);
        let missed = self.seen("kv_gaps") + self.seen("kv_losses");
        assert_eq!(missed + self.seen("unaligned_prompts"), 0.0);
        since.answers()
    }

    /// Evictions are under way while requests begin.
    fn several_at_once(&self, clients: u64) {
        let before = self.predictions();
        std::thread::scope(|scope| {
            for client in 0..clients {
                let url = &self.fleet.url;
                scope.spawn(move || {
                    let open = 100 / usize::try_from(clients).unwrap();
                    let shape = Shape::new(MODEL, 300, 8);
                    let mut chats = Chats::new(20 + client, &shape, open);
                    (0..500 / clients).for_each(|_| chats.turn(url));
                });
            }
        });
        let answers = self.report(&format!("{clients} clients"), before, 0.9);
        assert!(answers >= 450.0, "{answers}");
    }

    /// What the engine did while the agent was away is told again.
    fn a_map_outlives_its_agent(&mut self) {
        // Longer than from one writing of the map to the next.
        std::thread::sleep(Duration::from_secs(6));
        let batches = self.seen("kv_batches");
        self.fleet.kill("w1");
        for prompt in 0..5 {
            let text = words(&mut StdRng::seed_from_u64(prompt), 300);
            let body = serde_json::json!({"model": "tiny", "max_tokens": 1, "prompt": text});
            let url = format!("{}/v1/completions", self.engine.url());
            assert_eq!(post(&url, &body.to_string()).0, 200);
        }
        self.fleet.start_again(&["w1"]);
        self.until_exact("exact again");
        assert!(self.seen("resident_chunks") > 100.0);
        assert!(
            self.seen("kv_batches") < batches / 2.0,
            "only what was missed"
        );
        self.turns(150);
        assert!(self.report("its second start", Predictions::default(), 0.95) >= 100.0);
    }

    /// Nothing is said to be in the cache of what comes next.
    fn and_not_its_engine(&mut self) {
        self.engine.kill();
        within(SOON, "the engine is missed", || {
            (!self.is_exact()).then_some(())
        });
        let answer = ask(&self.fleet.url, &chat(MODEL, "a", false, 1));
        assert!(
            answer.status >= 500 && answer.is_typed_error(),
            "{answer:?}"
        );
        self.engine.spawn_again();
        self.engine.until_healthy();
        self.until_exact("exact with another engine");
        assert!(self.seen("resident_chunks") <= 1.0);
        self.turns(60);
        assert_eq!(
            self.seen("kv_settled_over"),
            0.0,
            "nothing of the dead engine is believed"
        );
    }
}
