//! Requests end to end on loopback: what is retried, what is told, what is given back.
#![allow(clippy::unwrap_used, clippy::panic)] // a test's helpers fail as its assertions do
#![allow(clippy::disallowed_methods)] // tests of the shell run in real time

mod common;

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use common::{Act, EVENT, REST, Saw, Setup, WHOLE, World, promptly};
use forebay_proto::wire::work::{End, Place, RefusalReason};

#[tokio::test]
async fn answers_are_relayed_byte_for_byte() {
    let world = World::with(1).await;
    let answer = world.chat(false).await;
    assert_eq!((answer.status, answer.body.as_str()), (200, WHOLE));
    assert!(answer.head.has("x-forebay-worker: w1\r\n"));
    let mut client = world.client().await;
    client.chat(true).await;
    let head = client.head().await;
    for header in [
        "content-type: text/event-stream",
        "cache-control: no-cache",
        "x-accel-buffering: no",
        "x-request-id: req-",
    ] {
        assert!(head.has(header), "{header}: {}", head.text);
    }
    assert_eq!(client.chunk().await.unwrap().unwrap(), EVENT);
    assert_eq!(client.chunk().await.unwrap().unwrap(), REST);
    assert_eq!(client.chunk().await, Ok(None));
    world.settles().await;
}

#[tokio::test]
async fn a_failure_before_the_first_byte_is_not_seen() {
    for streaming in [true, false] {
        for act in [
            Act::Break,
            Act::End(End::NotStarted),
            Act::End(End::EngineFailed),
            Act::End(End::Drained),
            Act::Status(503, "{}"),
            Act::Status(500, "{}"),
            Act::Refuse(RefusalReason::RefusalFull),
            Act::Refuse(RefusalReason::RefusalDraining),
            Act::Refuse(RefusalReason::RefusalStaleView),
        ] {
            let world = World::with(2).await;
            world.next(std::slice::from_ref(&act));
            let answer = world.chat(streaming).await;
            let whole = if streaming {
                format!("{EVENT}{REST}")
            } else {
                WHOLE.to_owned()
            };
            assert_eq!(answer.body, whole, "{act:?} {streaming}");
            world.settles().await;
        }
    }
}

#[tokio::test]
async fn a_failure_after_the_first_byte_is_told_and_never_done() {
    for act in [
        Act::BreakAfterFirst,
        Act::EndAfterFirst(End::EngineFailed),
        Act::GarbageAfterFirst,
    ] {
        let world = World::with(2).await;
        world.next(&[act]);
        let answer = world.chat(true).await;
        assert_eq!(answer.status, 200);
        let rest = answer.body.strip_prefix(EVENT).unwrap();
        assert!(rest.starts_with("data: {\"error\":{"), "{rest}");
        assert!(rest.contains("\"code\":\"upstream_error\""), "{rest}");
        assert!(!answer.body.contains("[DONE]"));
        world.settles().await;
        let (_, metrics) = world.page("/metrics").await;
        let retries = "forebay_balancer_retries_total 0\n";
        assert!(metrics.contains(retries), "nothing is retried after it");
    }
}

#[tokio::test]
async fn a_stream_that_a_drain_ends_at_its_deadline_says_so() {
    let world = World::with(2).await;
    world.next(&[Act::EndAfterFirst(End::Drained)]);
    let answer = world.chat(true).await;
    let rest = answer.body.strip_prefix(EVENT).unwrap();
    assert!(rest.contains("\"code\":\"worker_drained\""), "{rest}");
    assert!(!answer.body.contains("[DONE]"));
    world.settles().await;
}

#[tokio::test]
async fn an_answer_that_is_no_stream_is_retried_whole() {
    let world = World::with(2).await;
    world.agents[0].will(&[Act::BreakAfterFirst]);
    for _ in 0..4 {
        let answer = world.chat(false).await;
        assert_eq!((answer.status, answer.body.as_str()), (200, WHOLE));
    }
    world.settles().await;
}

#[tokio::test]
async fn when_retries_run_out_the_client_is_told() {
    let world = World::with(1).await;
    world.agents[0].will(&[Act::End(End::EngineFailed)]);
    let answer = world.chat(true).await;
    assert_eq!(answer.code(), (502, "upstream_error".into()));
    world.settles().await;
}

#[tokio::test]
async fn the_engines_own_refusals_are_relayed_and_not_retried() {
    let mut world = World::with(2).await;
    let own = Act::Status(400, "{\"error\":\"own words\"}");
    world.next(&[own]);
    let answer = world.chat(true).await;
    assert_eq!(answer.status, 400);
    assert_eq!(answer.body, "{\"error\":\"own words\"}");
    let placed = |saw: &Saw| matches!(saw, Saw::Placed { .. });
    let mut count = 0;
    for agent in &mut world.agents {
        while let Ok((_, saw)) = agent.saw.try_recv() {
            count += usize::from(placed(&saw));
        }
    }
    assert_eq!(count, 1);
}

#[tokio::test]
async fn a_client_that_leaves_cancels_its_request_within_100_ms() {
    for (streaming, act) in [
        (true, Act::Hang),
        (false, Act::Hang),
        (true, Act::HangAfterFirst),
        (true, Act::Flood),
    ] {
        eprintln!("{act:?}, streaming: {streaming}");
        promptly(Duration::from_millis(100), async || {
            let mut world = World::with(1).await;
            world.next(std::slice::from_ref(&act));
            let mut client = world.client().await;
            client.chat(streaming).await;
            world.agents[0].is_placed().await;
            if matches!(act, Act::HangAfterFirst | Act::Flood) {
                client.head().await;
            } else {
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
            let left = Instant::now();
            drop(client);
            let cancelled = world.agents[0].sees(&Saw::Cancelled).await;
            world.settles().await;
            cancelled - left
        })
        .await;
    }
}

#[tokio::test]
async fn who_waits_is_served_in_turn_and_who_leaves_is_forgotten() {
    let mut setup = Setup {
        slots: 1,
        ..Setup::default()
    };
    setup.pool.queue_limit = 2;
    let mut world = World::new(setup).await;
    world.agents[0].will(&[Act::HangAfterFirst]);
    let mut running = world.client().await;
    running.chat(true).await;
    running.head().await;
    let (mut waits, mut leaves) = (world.client().await, world.client().await);
    leaves.chat(false).await;
    waits.chat(false).await;
    world
        .until("/debug/bookings", |_, text| text.contains("\"queued\":2"))
        .await;
    let full = world.chat(false).await;
    assert_eq!(full.code(), (429, "overloaded".into()));
    assert!(full.head.has("retry-after: 1\r\n") && full.head.has("retry-after-ms: 1000\r\n"));
    assert!(full.head.has("x-forebay-dropped-reason: rejected-full"));
    drop(leaves);
    world
        .until("/debug/bookings", |_, text| text.contains("\"queued\":1"))
        .await;
    drop(running);
    world.agents[0].sees(&Saw::Cancelled).await;
    assert_eq!(waits.answer().await.body, WHOLE);
    world.settles().await;
}

#[tokio::test]
async fn waiting_ends_at_the_pools_deadline() {
    let mut setup = Setup {
        slots: 1,
        ..Setup::default()
    };
    setup.pool.queue_timeout_ms = 200;
    let world = World::new(setup).await;
    world.agents[0].will(&[Act::Hang]);
    let mut running = world.client().await;
    running.chat(true).await;
    world
        .until("/debug/bookings", |_, text| text.contains("\"bookings\":1"))
        .await;
    let answer = world.chat(true).await;
    assert_eq!(answer.code(), (429, "queue_timeout".into()));
    for header in [
        "retry-after: ",
        "retry-after-ms: ",
        "x-forebay-dropped-reason: rejected-queue-timeout\r\n",
    ] {
        assert!(answer.head.has(header), "{}", answer.head.text);
    }
    drop(running);
    world.settles().await;
}

#[tokio::test]
async fn after_a_refusal_by_an_old_view_the_best_few_are_asked_and_who_answers_is_preferred() {
    let world = World::with(3).await;
    *world.agents[2].quotes.lock() = Some(3);
    // On a busy machine an answer may come too late to be waited for.
    for _ in 0..20 {
        for agent in &world.agents[..2] {
            agent.will(&[Act::Refuse(RefusalReason::RefusalStaleView)]);
        }
        assert_eq!(world.chat(false).await.status, 200);
        let placed = world.agents[2].placed.lock().clone();
        let told = |place: &&Place| place.expected_cached_tokens == 3;
        if let Some(place) = placed.iter().find(told) {
            assert!(place.attempt > 0, "nobody is asked before a refusal");
            return world.settles().await;
        }
    }
    panic!("no answer was ever taken");
}

#[tokio::test]
async fn who_leaves_while_workers_are_asked_leaves_nothing_behind() {
    let mut world = World::with(1).await;
    let mut left_in_time = 0;
    // On a busy machine the answers' two milliseconds may be over before the leaving is noticed.
    for _ in 0..20 {
        world.agents[0].will(&[Act::Refuse(RefusalReason::RefusalStaleView)]);
        let before = world.agents[0].placed.lock().len();
        let mut client = world.client().await;
        client.chat(true).await;
        world.agents[0].sees(&Saw::Asked).await;
        drop(client);
        world.settles().await;
        left_in_time += u32::from(world.agents[0].placed.lock().len() == before + 1);
    }
    assert!(left_in_time > 0, "each was placed again after it had left");
    let (_, metrics) = world.page("/metrics").await;
    let cancelled = metrics.lines().filter(|line| line.contains("cancelled_"));
    let cancelled = cancelled.filter_map(|line| line.rsplit(' ').next()?.parse::<u32>().ok());
    assert!(cancelled.sum::<u32>() >= left_in_time, "{metrics}");
    // What was refused and given up keeps no place from others.
    assert_eq!(world.chat(false).await.body, WHOLE);
    world.settles().await;
}

#[tokio::test]
async fn after_some_refusals_the_worker_has_to_queue_it() {
    let mut world = World::with(1).await;
    let refuse = Act::Refuse(RefusalReason::RefusalStaleView);
    world.agents[0].will(&[refuse.clone(), refuse]);
    assert_eq!(world.chat(false).await.body, WHOLE);
    for (attempt, must_queue) in [(0, false), (1, false), (2, true)] {
        let saw = Saw::Placed {
            attempt,
            must_queue,
        };
        world.agents[0].sees(&saw).await;
    }
    world.settles().await;
}

#[tokio::test]
async fn a_first_byte_or_a_next_one_that_does_not_come_is_a_timeout() {
    let mut setup = Setup::default();
    setup.pool.first_byte_timeout_ms = 1_000;
    setup.pool.idle_timeout_ms = 500;
    let world = World::new(setup).await;
    world.agents[0].will(&[Act::Hang, Act::HangAfterFirst]);
    let answer = world.chat(true).await;
    assert_eq!(answer.code(), (504, "upstream_timeout".into()));
    let answer = world.chat(true).await;
    assert_eq!(answer.status, 200);
    assert!(answer.body.contains("upstream_timeout"), "{}", answer.body);
    assert!(!answer.body.contains("[DONE]"));
    world.settles().await;
}

#[tokio::test]
async fn a_late_first_byte_comes_after_a_held_back_head_and_a_ping() {
    let mut setup = Setup::default();
    setup.settings.hold_headers_ms = 100;
    let world = World::new(setup).await;
    world.agents[0].will(&[
        Act::Slow(Duration::from_millis(1_500)),
        Act::Slow(Duration::from_millis(400)),
    ]);
    let mut client = world.client().await;
    client.chat(true).await;
    let began = Instant::now();
    assert_eq!(client.head().await.status, 200);
    assert!(began.elapsed() < Duration::from_millis(1_400));
    assert_eq!(client.chunk().await.unwrap().unwrap(), ": ping\n\n");
    assert_eq!(client.chunk().await.unwrap().unwrap(), EVENT);
    // What is no stream has no head to send early.
    let began = Instant::now();
    assert_eq!(world.chat(false).await.body, WHOLE);
    assert!(began.elapsed() > Duration::from_millis(350));
}

#[tokio::test]
async fn a_failure_after_an_early_head_is_an_event() {
    let mut setup = Setup::default();
    setup.settings.hold_headers_ms = 50;
    setup.pool.first_byte_timeout_ms = 1_000;
    let world = World::new(setup).await;
    world.agents[0].will(&[Act::Hang]);
    let answer = world.chat(true).await;
    assert_eq!(answer.status, 200);
    assert!(answer.body.contains("\"code\":\"upstream_timeout\""));
    assert!(!answer.body.contains("[DONE]"));
    world.settles().await;
}

#[tokio::test]
async fn a_large_body_arrives_whole() {
    let mut world = World::with(1).await;
    let text = "x".repeat(3 << 20);
    let body = format!("{{\"model\":\"m\",\"messages\":[{{\"content\":\"{text}\"}}]}}");
    let mut client = world.client().await;
    client.post("/v1/chat/completions", "", &body).await;
    assert_eq!(client.answer().await.body, WHOLE);
    world.agents[0].sees(&Saw::Body(body.len())).await;
    world.settles().await;
}

/// Hangs one request on one of two workers, ends that worker, and says how long the answer took.
async fn fails_over(end: fn(&mut common::Agent)) -> Duration {
    let mut world = World::with(2).await;
    world.next(&[Act::Hang]);
    let mut client = world.client().await;
    client.chat(true).await;
    let (one, two) = world.agents.split_at_mut(1);
    let victim = tokio::select! {
        () = one[0].is_placed() => 0,
        () = two[0].is_placed() => 1,
    };
    let began = Instant::now();
    end(&mut world.agents[victim]);
    let answer = client.answer().await;
    let took = began.elapsed();
    assert_eq!(answer.body, format!("{EVENT}{REST}"));
    for _ in 0..4 {
        assert_eq!(world.chat(false).await.body, WHOLE, "nobody asks the dead");
    }
    world.settles().await;
    took
}

#[tokio::test]
async fn a_worker_that_says_goodbye_fails_over_at_once() {
    let measure = async || fails_over(common::Agent::closes).await;
    promptly(Duration::from_millis(500), measure).await;
}

#[tokio::test]
async fn a_worker_that_dies_without_a_word_is_found_out_by_a_probe() {
    let measure = async || fails_over(common::Agent::dies).await;
    promptly(Duration::from_millis(1_500), measure).await;
}

#[tokio::test]
async fn a_client_that_does_not_read_holds_its_engine_back() {
    let mut world = World::with(1).await;
    world.next(&[Act::Flood]);
    let mut client = world.client().await;
    client.chat(true).await;
    world.agents[0].is_placed().await;
    let flooded = || world.agents[0].flooded.load(Ordering::Relaxed);
    let mut before = 0;
    loop {
        tokio::time::sleep(Duration::from_millis(300)).await;
        let now = flooded();
        if now == before && now > 0 {
            break;
        }
        before = now;
    }
    assert!(before < 16 << 20, "{before} bytes are on their way");
    assert_eq!(world.agents.len(), 1);
    // Others are served meanwhile.
    assert_eq!(world.chat(false).await.body, WHOLE);
    drop(client);
    world.agents[0].sees(&Saw::Cancelled).await;
    world.settles().await;
}

#[tokio::test]
async fn facts_take_effect_without_a_restart() {
    let world = World::with(2).await;
    let mut fleet = (**world.fleet.borrow().as_ref().unwrap()).clone();
    fleet.workers[0].desired = forebay_proto::wire::fleet::Desired::Cordoned;
    fleet.workers.truncate(1);
    world
        .fleet
        .send_replace(Some(std::sync::Arc::new(fleet.clone())));
    world
        .until("/debug/workers", |_, text| !text.contains("\"w2\""))
        .await;
    let answer = world.chat(false).await;
    assert_eq!(answer.code(), (503, "no_capacity".into()));
    fleet.workers[0].desired = forebay_proto::wire::fleet::Desired::Ready;
    world.fleet.send_replace(Some(std::sync::Arc::new(fleet)));
    assert_eq!(world.chat(false).await.body, WHOLE);
}

#[tokio::test]
async fn an_engines_refusal_after_an_early_head_is_an_event_with_its_words() {
    let mut setup = Setup::default();
    setup.settings.hold_headers_ms = 50;
    let world = World::new(setup).await;
    world.next(&[Act::LateStatus(400, "{\"error\":\n\"own words\"}")]);
    let answer = world.chat(true).await;
    assert_eq!(answer.status, 200);
    assert!(answer.body.ends_with("data: {\"error\":\"own words\"}\n\n"));
}

#[tokio::test]
async fn an_adapter_is_listed_and_asked_for_like_a_model() {
    let world = World::with(2).await;
    let mut fleet = (**world.fleet.borrow().as_ref().unwrap()).clone();
    fleet.workers[1].spec.adapters = vec!["org/tuned".into()];
    world.fleet.send_replace(Some(std::sync::Arc::new(fleet)));
    let mut client = world.client().await;
    for (path, has) in [
        ("/v1/models", "\"id\":\"org/tuned\""),
        ("/v1/models/org%2Ftuned", "\"id\":\"org/tuned\""),
    ] {
        client
            .send(&format!("GET {path} HTTP/1.1\r\nhost: x\r\n\r\n"))
            .await;
        let answer = client.answer().await;
        assert_eq!(answer.status, 200, "{path}");
        assert!(answer.body.contains(has), "{path}: {}", answer.body);
    }
    for _ in 0..5 {
        let body = "{\"model\":\"org/tuned\",\"messages\":[]}";
        client.post("/v1/chat/completions", "", body).await;
        let answer = client.answer().await;
        assert_eq!(answer.body, WHOLE);
        assert!(answer.head.has("x-forebay-worker: w2\r\n"));
    }
    world.settles().await;
}

#[tokio::test]
async fn all_who_wait_for_a_model_are_told_together_that_nobody_is_left() {
    let mut setup = Setup {
        slots: 1,
        ..Setup::default()
    };
    setup.pool.queue_timeout_ms = 60_000;
    let mut world = World::new(setup).await;
    world.next(&[Act::Hang]);
    let mut running = world.client().await;
    running.chat(true).await;
    world.agents[0].is_placed().await;
    let mut waiting = Vec::new();
    for _ in 0..4 {
        let mut client = world.client().await;
        client.chat(true).await;
        waiting.push(client);
    }
    let all_wait = |_, text: &str| text.contains("\"queued\":4");
    world.until("/debug/bookings", all_wait).await;
    world.agents[0].closes();
    let began = Instant::now();
    for client in &mut waiting {
        let answer = client.answer().await;
        assert_eq!(answer.code(), (503, "no_capacity".into()));
    }
    let took = began.elapsed();
    assert!(took < Duration::from_secs(4), "{took:?}");
}

#[tokio::test]
async fn a_client_that_leaves_while_it_sends_counts_as_cancelled_not_as_wrong() {
    let world = World::with(1).await;
    let mut client = world.client().await;
    client
        .send("POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{")
        .await;
    world
        .until("/debug/bookings", |_, text| text.contains("\"inflight\":1"))
        .await;
    drop(client);
    world.settles().await;
    let (_, metrics) = world.page("/metrics").await;
    assert!(metrics.contains("requests_total{outcome=\"cancelled_queued\"} 1\n"));
    assert!(!metrics.contains("invalid_json"));
}

#[tokio::test]
async fn a_worker_that_keeps_refusing_is_not_asked_in_a_tight_loop() {
    let world = World::with(1).await;
    let refusals = [const { Act::Refuse(RefusalReason::RefusalBodyBudget) }; 20];
    world.agents[0].will(&refusals);
    let began = Instant::now();
    assert_eq!(world.chat(false).await.body, WHOLE);
    let took = began.elapsed();
    assert!(took >= Duration::from_millis(190), "{took:?}");
    world.settles().await;
}
