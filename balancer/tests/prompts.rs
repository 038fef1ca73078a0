//! What a balancer finds out about prompts, what it tells agents of it, and what it makes of the answer.
#![allow(clippy::unwrap_used, clippy::panic)] // a test's helpers fail as its assertions do
#![allow(clippy::disallowed_methods)] // tests of the shell run in real time

mod common;

use std::sync::Arc;

use common::{Setup, World};
use forebay_balancer::Fleet;
use forebay_proto::wire::work::Place;
use forebay_proto::{FingerprintKey, Revision};
use serde_json::{Value, json};

const KEY: FingerprintKey = FingerprintKey {
    epoch: 3,
    bytes: [7; 16],
};
/// The SHA-256 of the keys `one` and `two`.
const ONE: &str = "7692c3ad3540bb803c020b3aee66cd8887123234ea0c6e7143c0add73ff431ed";
const TWO: &str = "3fc4ccfe745870e2c0d99f71f30ff0656c8dedd41cc1d7d3d376b0dbe685e2f3";

fn setup(agents: usize) -> Setup {
    Setup {
        agents,
        key: Some(KEY),
        ..Setup::default()
    }
}

fn policy(agents: usize, policy: &str) -> Setup {
    let mut setup = setup(agents);
    setup.pool.policy = policy.into();
    setup
}

/// A text of so many bytes that repeats nothing, and is another one for another seed.
fn text(seed: u64, bytes: usize) -> String {
    let words = (0..).map(|n: u64| format!("{seed}-{n} "));
    let mut text = String::new();
    for word in words {
        if text.len() >= bytes {
            text.truncate(bytes);
            return text;
        }
        text.push_str(&word);
    }
    text
}

fn chat(turns: &[&str]) -> Value {
    let roles = ["user", "assistant"].into_iter().cycle();
    let messages: Vec<_> = roles
        .zip(turns)
        .map(|(role, content)| json!({"role": role, "content": content}))
        .collect();
    json!({"model": "m", "messages": messages, "max_tokens": 77})
}

async fn post(world: &World, path: &str, key: &str, body: &Value) {
    let mut client = world.client().await;
    let headers = format!("authorization: Bearer {key}\r\ncontent-type: application/json\r\n");
    client.post(path, &headers, &body.to_string()).await;
    let answer = client.answer().await;
    assert_eq!(answer.status, 200, "{}", answer.body);
}

/// What the agent was told that got this request, and that had none before.
async fn place(world: &World, path: &str, key: &str, body: &Value) -> Place {
    post(world, path, key, body).await;
    let mut placed = world
        .agents
        .iter()
        .filter_map(|agent| agent.placed.lock().pop());
    placed.next().unwrap()
}

async fn told(world: &World, body: &Value) -> Place {
    place(world, "/v1/chat/completions", "any", body).await
}

async fn counter(world: &World, name: &str, value: u64) {
    let line = format!("\nforebay_balancer_{name}_total {value}\n");
    world
        .until("/metrics", |_, text| text.contains(&line))
        .await;
}

#[tokio::test]
async fn a_second_turn_extends_the_chunks_of_the_first() {
    let world = World::new(setup(1)).await;
    let (question, answer, next) = (text(1, 3_000), text(2, 500), text(3, 900));
    let first = told(&world, &chat(&[&question])).await;
    assert_eq!(first.chunks.len() as u64, first.prompt_bytes / 256);
    assert!((3_000..3_100).contains(&first.prompt_bytes));
    assert_eq!((first.chunk_bytes, first.key_epoch), (256, KEY.epoch));
    assert_eq!((first.max_tokens, first.attempt), (77, 0));
    assert!(!first.cache_salt.is_empty() && first.prompt_tokens > 500);
    let promised = 1_000 + first.prompt_tokens / 4;
    let left = first.ttft_target_ms.unwrap();
    assert!((promised / 2..=promised).contains(&left), "{left}");
    assert_eq!(first.tpot_target_ms, Some(150));

    let second = told(&world, &chat(&[&question, &answer, &next])).await;
    assert!(second.chunks.len() >= first.chunks.len() + 5);
    assert_eq!(second.chunks[..first.chunks.len()], first.chunks);

    let other = told(&world, &chat(&[&text(9, 3_000)])).await;
    assert!(
        other
            .chunks
            .iter()
            .all(|chunk| !first.chunks.contains(chunk))
    );
    assert_eq!(other.cache_salt, first.cache_salt);
}

#[tokio::test]
async fn tenants_share_no_chunk_and_no_salt() {
    let mut setup = setup(1);
    let file = tempfile::NamedTempFile::new().unwrap();
    let keys: String = [(ONE, "one"), (TWO, "two")]
        .map(|(hash, tenant)| format!("[[keys]]\nsha256 = \"{hash}\"\ntenant = \"{tenant}\"\n"))
        .concat();
    std::fs::write(file.path(), keys).unwrap();
    setup.settings.keys = Some(file.path().to_owned());
    setup.settings.any_key_tenant = None;
    let world = World::new(setup).await;
    let body = chat(&[&text(1, 3_000)]);
    let path = "/v1/chat/completions";
    let one = place(&world, path, "one", &body).await;
    let two = place(&world, path, "two", &body).await;
    assert_eq!(one.chunks.len(), two.chunks.len());
    assert!(one.chunks.iter().all(|chunk| !two.chunks.contains(chunk)));
    assert_ne!(one.cache_salt, two.cache_salt);
    let again = place(&world, path, "one", &body).await;
    assert_eq!(again.chunks, one.chunks);
}

#[tokio::test]
async fn completions_have_chunks_and_what_has_no_fingerprint_has_its_size() {
    let world = World::new(setup(1)).await;
    let prompt = text(1, 3_000);
    let body = json!({"model": "m", "prompt": prompt});
    let completion = place(&world, "/v1/completions", "any", &body).await;
    assert_eq!(completion.chunks.len(), 11);

    let body = json!({"model": "m", "input": prompt});
    let embedding = place(&world, "/v1/embeddings", "any", &body).await;
    assert_eq!(embedding.chunks, [0; 0]);
    assert_eq!(embedding.prompt_bytes, embedding.body_bytes);

    let mut body = chat(&[&prompt]);
    body["chat_template"] = json!("{{ messages }}");
    let template = told(&world, &body).await;
    assert_eq!(template.chunks, [0; 0]);
    assert_eq!(template.prompt_bytes, template.body_bytes);
    assert!(template.prompt_tokens > 500);
}

#[tokio::test]
async fn before_there_is_a_key_prompts_are_placed_by_their_size() {
    let world = World::with(1).await;
    let place = told(&world, &chat(&[&text(1, 3_000)])).await;
    assert_eq!(place.chunks, [0; 0]);
    assert_eq!((place.key_epoch, place.prompt_bytes), (0, place.body_bytes));
    assert!(place.prompt_tokens > 500);
}

/// New facts, once they are in use.
async fn told_of(world: &World, change: impl FnOnce(&mut Fleet)) {
    let mut fleet = (**world.fleet.borrow().as_ref().unwrap()).clone();
    fleet.revision = Revision(fleet.revision.0 + 1);
    let line = format!("\nforebay_balancer_facts_revision {}\n", fleet.revision.0);
    change(&mut fleet);
    world.fleet.send_replace(Some(Arc::new(fleet)));
    world
        .until("/metrics", |_, text| text.contains(&line))
        .await;
}

#[tokio::test]
async fn prompts_are_read_as_most_workers_of_their_pool_render_them() {
    let world = World::new(setup(2)).await;
    let body = chat(&[&text(1, 3_000)]);
    let usual = told(&world, &body).await;
    let label = |fleet: &mut Fleet, at: usize, profile: &str| {
        let labels = &mut fleet.workers[at].spec.labels;
        labels.insert("render-profile".into(), profile.into());
    };
    told_of(&world, |fleet| {
        label(fleet, 0, "tools_first+names");
        label(fleet, 1, "tools_first+names");
    })
    .await;
    let other = told(&world, &body).await;
    assert_eq!(other.chunks.len(), usual.chunks.len());
    assert_ne!(other.chunks[0], usual.chunks[0]);
    told_of(&world, |fleet| {
        label(fleet, 0, "of_the_future");
        label(fleet, 1, "of_the_future");
    })
    .await;
    let unknown = told(&world, &body).await;
    assert_eq!(unknown.chunks, [0; 0], "placed by load only");
    assert_eq!(unknown.prompt_bytes, usual.prompt_bytes);
    assert_eq!(unknown.cache_salt, usual.cache_salt);
}

#[tokio::test]
async fn who_renders_otherwise_serves_and_counts_as_holding_nothing() {
    let world = World::new(setup(2)).await;
    let body = chat(&[&text(1, 3_000)]);
    let chunks = told(&world, &body).await.chunks;
    let held: Vec<_> = (1..).zip(&chunks).map(|(n, c)| (*c, n * 70)).collect();
    world.agents[1].holds(&held);
    let line = format!("\nforebay_balancer_residency_chunks {}\n", held.len());
    world
        .until("/metrics", |_, text| text.contains(&line))
        .await;
    let whole = held.len() as u32 * 70;
    assert_eq!(told(&world, &body).await.expected_cached_tokens, whole);
    told_of(&world, |fleet| {
        let labels = &mut fleet.workers[1].spec.labels;
        labels.insert("render-profile".into(), "tools_first".into());
    })
    .await;
    assert_eq!(told(&world, &body).await.expected_cached_tokens, 0);
    for seed in 0..40 {
        spread(&world, 1, &chat(&[&text(seed, 3_000)])).await;
    }
    let [alike, unlike] = &world.agents[..] else {
        panic!("two agents");
    };
    let (alike, unlike) = (alike.placed.lock(), unlike.placed.lock());
    assert!(alike.len() >= 5 && unlike.len() >= 5, "both serve");
    assert!(alike.iter().all(|place| place.chunks.len() == chunks.len()));
    assert!(unlike.iter().all(|place| place.chunks.is_empty()));
}

#[tokio::test]
async fn what_cannot_be_read_is_shared_with_nobody() {
    let world = World::new(setup(1)).await;
    let readable = told(&world, &chat(&["a"])).await;
    let body = json!({"model": "m", "messages": [{"role": "user", "content": 7}]});
    let (one, other) = (told(&world, &body).await, told(&world, &body).await);
    assert_eq!((one.chunks.len(), one.prompt_bytes), (0, one.body_bytes));
    assert_eq!(one.cache_salt.len(), 32);
    assert_ne!(one.cache_salt, readable.cache_salt);
    assert_ne!(one.cache_salt, other.cache_salt);
}

#[tokio::test]
async fn what_engines_count_is_learnt_and_compared_with_what_was_predicted() {
    let world = World::new(setup(1)).await;
    let body = chat(&[&text(1, 4_000)]);
    // No counts at all, then none of cached tokens: absent is not zero.
    told(&world, &body).await;
    *world.agents[0].counts.lock() = Some((1_000, None));
    told(&world, &body).await;
    counter(&world, "prompt_tokens", 1_000).await;
    counter(&world, "cached_tokens_reported", 0).await;

    *world.agents[0].counts.lock() = Some((1_000, Some(600)));
    let learnt = told(&world, &body).await;
    assert!((950..=1_100).contains(&learnt.prompt_tokens), "{learnt:?}");
    counter(&world, "prompt_tokens", 2_000).await;
    counter(&world, "cached_tokens_reported", 600).await;
    counter(&world, "cached_tokens_predicted", 0).await;

    // It holds the first ten chunks, in 700 tokens.
    let held: Vec<_> = (1..)
        .zip(&learnt.chunks[..10])
        .map(|(n, c)| (*c, n * 70))
        .collect();
    world.agents[0].holds(&held);
    let line = "\nforebay_balancer_residency_chunks 10\n";
    world.until("/metrics", |_, text| text.contains(line)).await;
    let warm = told(&world, &body).await;
    assert_eq!(warm.expected_cached_tokens, 700);
    // What is held was counted there, and only the rest is estimated: as it was learnt, and a little more,
    // because what is held has more tokens than were foreseen.
    let rest = (warm.prompt_bytes - 2_560) / 4;
    let estimated = u64::from(warm.prompt_tokens) - 700;
    assert!((rest..rest * 6 / 5).contains(&estimated), "{warm:?}");
    counter(&world, "cached_tokens_predicted", 700).await;
    counter(&world, "cached_tokens_reported", 1_200).await;
}

/// Of so many requests with this prompt, one after the other, how many each agent got.
async fn spread(world: &World, requests: usize, body: &Value) -> Vec<usize> {
    for _ in 0..requests {
        post(world, "/v1/chat/completions", "any", body).await;
    }
    let counts = world.agents.iter().map(|agent| agent.placed.lock().len());
    counts.collect()
}

#[tokio::test]
async fn a_prompt_goes_where_its_beginning_is_held_if_the_pools_policy_looks() {
    for (name, follows) in [
        ("forebay", true),
        ("longest-prefix", true),
        ("round-robin", false),
        ("least-requests", false),
    ] {
        let world = World::new(policy(4, name)).await;
        let body = chat(&[&text(1, 20_000)]);
        post(&world, "/v1/chat/completions", "any", &body).await;
        let mut agents = world.agents.iter();
        let chunks = agents
            .find_map(|agent| agent.placed.lock().pop())
            .unwrap()
            .chunks;
        let held: Vec<_> = (1..)
            .zip(&chunks)
            .map(|(n, chunk)| (*chunk, n * 64))
            .collect();
        world.agents[2].holds(&held);
        let line = format!("\nforebay_balancer_residency_chunks {}\n", chunks.len());
        world
            .until("/metrics", |_, text| text.contains(&line))
            .await;
        let counts = spread(&world, 12, &body).await;
        assert_eq!(counts[2] == 12, follows, "{name}: {counts:?}");
        let placed = world.agents[2].placed.lock().pop();
        if let Some(place) = placed.filter(|_| follows) {
            assert_eq!(place.expected_cached_tokens as usize, chunks.len() * 64);
            assert_eq!(place.expected_wait_ms.is_some(), name == "forebay");
            assert_eq!(place.expected_ttft_ms.is_some(), name == "forebay");
        }
    }
}

#[tokio::test]
async fn turns_are_taken_for_each_model_whatever_else_is_asked() {
    let mut setup = policy(2, "round-robin");
    setup.adapters = vec!["tuned".into()];
    let world = World::new(setup).await;
    for _ in 0..6 {
        for model in ["m", "tuned"] {
            let body = json!({"model": model, "messages": []});
            post(&world, "/v1/chat/completions", "any", &body).await;
        }
    }
    for agent in &world.agents {
        let placed = agent.placed.lock();
        let of = |model: &str| placed.iter().filter(|place| place.model == model).count();
        assert_eq!((of("m"), of("tuned")), (3, 3));
    }
}

#[tokio::test]
async fn cold_prompts_go_together_where_the_client_says_so() {
    for (key, together) in [(Some("session-1"), true), (None, false)] {
        let world = World::new(setup(4)).await;
        for seed in 0..12 {
            let mut body = chat(&[&text(seed, 2_000)]);
            if let Some(key) = key {
                body["prompt_cache_key"] = json!(key);
            }
            post(&world, "/v1/chat/completions", "any", &body).await;
        }
        let counts = world.agents.iter().map(|agent| agent.placed.lock().len());
        let counts: Vec<usize> = counts.collect();
        assert_eq!(counts.contains(&12), together, "{counts:?}");
    }
}

/// What the engine of a fake agent had of a prompt, by the salt and chunks that it was told.
#[derive(Default)]
struct Held(std::collections::BTreeMap<(String, u64), u32>);

impl Held {
    /// Chunks of this placement that were there; all are afterwards.
    fn serve(&mut self, place: &Place) -> usize {
        let key = |chunk: &u64| (place.cache_salt.clone(), *chunk);
        let chunks = place.chunks.iter();
        let hit = chunks.take_while(|chunk| self.0.contains_key(&key(chunk)));
        let hit = hit.count();
        for (tokens, chunk) in (64..).step_by(64).zip(&place.chunks) {
            self.0.insert(key(chunk), tokens);
        }
        hit
    }

    async fn tell(&self, world: &World) {
        let chunks: Vec<_> = self
            .0
            .iter()
            .map(|((_, chunk), tokens)| (*chunk, *tokens))
            .collect();
        world.agents[0].holds(&chunks);
        let line = format!("\nforebay_balancer_residency_chunks {}\n", chunks.len());
        world
            .until("/metrics", |_, text| text.contains(&line))
            .await;
    }
}

/// Chunks that the engine had, of those of eight conversations that go on.
async fn go_on(
    world: &World,
    held: &mut Held,
    epochs: std::ops::RangeInclusive<u32>,
) -> (usize, usize) {
    let (mut had, mut all) = (0, 0);
    for seed in 0..8 {
        let place = told(world, &chat(&[&text(seed, 6_000)])).await;
        assert!(epochs.contains(&place.key_epoch), "{}", place.key_epoch);
        had += held.serve(&place);
        all += place.chunks.len();
    }
    held.tell(world).await;
    (had, all)
}

async fn rotate(world: &World, epochs: &[u32]) {
    world.fleet.send_modify(|fleet| {
        let mut next = (**fleet.as_ref().unwrap()).clone();
        next.revision.0 += 1;
        next.keys = epochs
            .iter()
            .map(|epoch| FingerprintKey {
                epoch: *epoch,
                bytes: [u8::try_from(*epoch).unwrap(); 16],
            })
            .collect();
        *fleet = Some(std::sync::Arc::new(next));
    });
    let revision = world.fleet.borrow().as_ref().unwrap().revision.0;
    let line = format!("\nforebay_balancer_facts_revision {revision}\n");
    world
        .until("/metrics", |_, text| text.contains(&line))
        .await;
}

#[tokio::test]
async fn what_is_cached_under_the_key_before_is_found_for_a_while() {
    let mut setup = setup(1);
    setup.settings.key_overlap = std::time::Duration::from_secs(3_600);
    let world = World::new(setup).await;
    let mut held = Held::default();
    rotate(&world, &[1]).await;
    let (had, all) = go_on(&world, &mut held, 1..=1).await;
    assert_eq!(had, 0, "of {all}, all are new");
    let (had, all) = go_on(&world, &mut held, 1..=1).await;
    assert_eq!(had, all, "before the rotation");

    rotate(&world, &[1, 2]).await;
    let (had, all) = go_on(&world, &mut held, 1..=1).await;
    assert_eq!(had, all, "right after it");
    counter(&world, "prompts_by_older_key", 8).await;
    let fresh = told(&world, &chat(&[&text(99, 6_000)])).await;
    assert_eq!(fresh.key_epoch, 2, "what nobody has goes by the newest");

    // One more, and the first is not known any more: this is what a rotation without an overlap costs.
    rotate(&world, &[2, 3]).await;
    let (had, _) = go_on(&world, &mut held, 3..=3).await;
    assert_eq!(had, 0);
    let (had, all) = go_on(&world, &mut held, 3..=3).await;
    assert_eq!(had, all, "when everything was served again");
}

#[tokio::test]
async fn every_prompt_moves_to_the_newest_key_once_and_within_the_overlap() {
    let mut setup = setup(1);
    setup.settings.key_overlap = std::time::Duration::from_secs(3);
    let world = World::new(setup).await;
    let mut held = Held::default();
    rotate(&world, &[1]).await;
    go_on(&world, &mut held, 1..=1).await;
    let began = std::time::Instant::now();
    rotate(&world, &[1, 2]).await;
    let (mut missed, mut all, mut turns) = (0, 0, Vec::new());
    while began.elapsed() < std::time::Duration::from_millis(3_500) {
        let (had, of) = go_on(&world, &mut held, 1..=2).await;
        all = of;
        missed += of - had;
        turns.push(of - had);
    }
    assert_eq!(
        missed, all,
        "each is prefilled once more, no oftener: {turns:?}"
    );
    let (had, of) = go_on(&world, &mut held, 2..=2).await;
    assert_eq!(had, of);
}
