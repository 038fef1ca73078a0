//! What the agent makes of engines of several kinds: of what they say of themselves, and of how they fail.

#![allow(
    clippy::disallowed_methods,
    clippy::unwrap_used,
    clippy::panic,
    unreachable_pub,
    dead_code
)] // a test of the rims: sockets and clocks

mod common;
mod scripted;

use std::time::Duration;

use common::*;
use forebay_proto::wire::work::{End, Place, RefusalReason};
use forebay_worker_agent::{Adapter, Manner, Patience};
use scripted::{Answer as Says, Scripted};

const DONE: &str = "data: [DONE]\n\n";
const SAID: &str =
    "data: {\"choices\":[{\"delta\":{\"content\":\"x\"},\"finish_reason\":null}]}\n\n";
const STOPS: &str = "data: {\"choices\":[{\"delta\":{},\"finish_reason\":\"stop\"}]}\n\n";

/// Looks often, so that a test sees what follows from a look.
async fn beside(engine: &Scripted) -> Agent {
    Agent::set_up(engine.address, |setup| {
        setup.manner = Manner {
            asks_size: true,
            ..Manner::default()
        };
        setup.patience = Patience {
            looks: Duration::from_millis(50),
            ..Patience::default()
        };
    })
    .await
}

async fn served(balancer: &Balancer, body: &str) -> Answer {
    let mut placed = balancer.place(body).await;
    placed.answer().await
}

#[tokio::test]
async fn an_engine_is_known_by_what_it_answers() {
    let check = async |engine: Scripted, kind: &str, adapter, kv_tokens, context| {
        let agent = beside(&engine).await;
        let status = agent.work.status().borrow().clone();
        let found = status.engine.unwrap();
        assert_eq!((found.kind.as_str(), found.adapter), (kind, adapter));
        assert_eq!(
            (found.kv_tokens, found.max_context_tokens),
            (kv_tokens, context)
        );
    };
    check(
        Scripted::vllm().await,
        "vllm",
        Adapter::Vllm,
        Some(3_104),
        Some(2_048),
    )
    .await;
    check(
        Scripted::sglang().await,
        "sglang",
        Adapter::Sglang,
        Some(454_942),
        Some(16_384),
    )
    .await;
    check(
        Scripted::llama().await,
        "llama.cpp",
        Adapter::LlamaCpp,
        Some(8_192),
        Some(2_048),
    )
    .await;
    check(
        Scripted::unknown().await,
        "openai",
        Adapter::Generic,
        None,
        None,
    )
    .await;
}

#[tokio::test]
async fn an_engine_gets_no_more_at_once_than_it_runs() {
    let slots = async |engine: Scripted, asks_slots| {
        let agent = Agent::set_up(engine.address, |setup| {
            setup.settings.slots = 64;
            setup.manner = Manner {
                asks_slots,
                ..Manner::default()
            };
        })
        .await;
        let balancer = agent.balancer("b1").await;
        let load = balancer.refusal(&of_model("another", "{}")).await.load;
        load.unwrap().slots
    };
    assert_eq!(slots(Scripted::llama().await, true).await, 4);
    assert_eq!(
        slots(Scripted::llama().await, false).await,
        64,
        "an operator said so"
    );
    assert_eq!(
        slots(Scripted::vllm().await, true).await,
        64,
        "it does not say"
    );
}

#[tokio::test]
async fn an_engine_is_asked_how_it_renders_prompts() {
    let render = async |engine: Scripted| {
        let agent = beside(&engine).await;
        let status = agent.work.status().borrow().clone();
        status.engine.unwrap().render.map(|render| render.id())
    };
    let found = render(Scripted::llama().await).await;
    assert_eq!(
        found.as_deref(),
        Some("tools_first+developer+no_reasoning+names")
    );
    // They have no page for it, or none of their pages answers.
    assert_eq!(render(Scripted::vllm().await).await, None);
    assert_eq!(render(Scripted::unknown().await).await, None);
}

#[tokio::test]
async fn each_kind_gets_what_it_understands() {
    let check = async |engine: Scripted, model: &str, expected: &str| {
        let agent = beside(&engine).await;
        let balancer = agent.balancer("b1").await;
        engine.says(Says::events(&[SAID, STOPS, DONE]));
        let body = r#"{"model":"m","stream":true,"id_slot":1,"rid":"x","request_id":"y"}"#;
        let place = Place {
            model: model.into(),
            cache_salt: "0123".into(),
            ..place(body.len())
        };
        let mut placed = balancer.offer(&place).await;
        placed.accepted().await;
        placed.send_body(body).await;
        assert_eq!(placed.answer().await.end(), End::Complete);
        let seen = engine.asked();
        assert_eq!(seen.body, expected);
        assert!(seen.request_id.starts_with("r1-"), "{}", seen.request_id);
    };
    let usage = r#""stream_options":{"include_usage":true}"#;
    let vllm = format!(
        r#"{{"cache_salt":"0123",{usage},"model":"m","stream":true,"id_slot":1,"rid":"x"}}"#
    );
    check(Scripted::vllm().await, "tiny", &vllm).await;
    let sglang = format!(
        r#"{{"cache_salt":"0123",{usage},"model":"m","stream":true,"id_slot":1,"request_id":"y"}}"#
    );
    check(Scripted::sglang().await, "tiny", &sglang).await;
    let llama = format!(r#"{{{usage},"model":"m","stream":true,"rid":"x","request_id":"y"}}"#);
    check(Scripted::llama().await, "tiny/tiny.gguf", &llama).await;
    let generic = r#"{"model":"m","stream":true,"id_slot":1,"rid":"x","request_id":"y"}"#;
    check(Scripted::unknown().await, "any", generic).await;
}

fn of_model(model: &str, body: &str) -> Place {
    Place {
        model: model.into(),
        ..place(body.len())
    }
}

async fn ask(balancer: &Balancer, model: &str) -> Answer {
    let body = r#"{"model":"m","stream":true}"#;
    let mut placed = balancer.offer(&of_model(model, body)).await;
    placed.accepted().await;
    placed.send_body(body).await;
    placed.answer().await
}

#[tokio::test]
async fn an_error_inside_a_stream_is_a_failure_whatever_follows() {
    let engine = Scripted::vllm().await;
    let agent = beside(&engine).await;
    let balancer = agent.balancer("b1").await;
    let sigterm = include_str!("samples/vllm-stream-error-sigterm.sse");
    for (events, passed) in [
        (vec![sigterm], ""),
        (vec![SAID, sigterm], SAID),
        (vec![SAID, DONE], SAID),
        (vec![SAID], SAID),
    ] {
        engine.says(Says::events(&events));
        let answer = ask(&balancer, "tiny").await;
        assert_eq!(answer.end(), End::EngineFailed, "{events:?}");
        assert_eq!(String::from_utf8(answer.text).unwrap(), passed);
    }
    engine.says(Says::events(&[SAID, STOPS, DONE]));
    let answer = ask(&balancer, "tiny").await;
    assert_eq!(answer.end(), End::Complete);
    assert_eq!(answer.text, [SAID, STOPS, DONE].concat().into_bytes());
}

#[tokio::test]
async fn an_engine_that_did_not_begin_says_so_and_others_may() {
    let engine = Scripted::vllm().await;
    let agent = beside(&engine).await;
    let balancer = agent.balancer("b1").await;
    engine.says(Says::of(
        503,
        include_str!("samples/vllm-error-overload.json"),
    ));
    let answer = ask(&balancer, "tiny").await;
    assert_eq!(answer.end(), End::NotStarted);
    assert!(answer.head.is_none(), "nothing of it is relayed");

    engine.says(Says::of(
        400,
        include_str!("samples/vllm-error-toolong.json"),
    ));
    let answer = ask(&balancer, "tiny").await;
    assert_eq!(
        (answer.end(), answer.head.unwrap().status),
        (End::Complete, 400)
    );
    assert_eq!(
        answer.text,
        include_bytes!("samples/vllm-error-toolong.json")
    );

    let dead = r#"{"error":{"message":"EngineCore encountered an issue.","code":500}}"#;
    engine.says(Says::of(500, dead));
    let answer = ask(&balancer, "tiny").await;
    assert_eq!(
        (answer.end(), answer.head.unwrap().status),
        (End::Complete, 500)
    );
    assert_eq!(
        answer.text,
        dead.as_bytes(),
        "it may have begun: it counts as a failure"
    );
}

#[tokio::test]
async fn an_engine_that_stops_gets_nothing_more_though_its_health_is_good() {
    let engine = Scripted::vllm().await;
    let agent = beside(&engine).await;
    let balancer = agent.balancer("b1").await;
    engine.says(Says::of(
        500,
        include_str!("samples/vllm-error-stopping.json"),
    ));
    assert_eq!(ask(&balancer, "tiny").await.end(), End::NotStarted);
    let body = "{}";
    // Many looks later: each found it healthy, and none believed it.
    tokio::time::sleep(Duration::from_millis(600)).await;
    let refused = balancer.refusal(&of_model("tiny", body)).await;
    assert_eq!(refused.reason(), RefusalReason::RefusalEngineDown);

    engine.says(Says::of(200, r#"{"choices":[{"finish_reason":"length"}]}"#));
    let mut status = agent.work.status();
    let ready = |status: &forebay_worker_agent::Status| {
        status.observed == forebay_proto::wire::fleet::Observed::Ready
    };
    let back = status.wait_for(ready);
    drop(tokio::time::timeout(PATIENCE, back).await.unwrap().unwrap());
    let proof = engine.asked();
    assert!(proof.body.contains(r#""max_tokens":1"#), "{}", proof.body);
}

#[tokio::test]
async fn an_engine_that_keeps_no_caches_apart_serves_one_tenant() {
    let engine = Scripted::llama().await;
    let agent = beside(&engine).await;
    let balancer = agent.balancer("b1").await;
    let model = "tiny/tiny.gguf";
    engine.says(Says::events(&[SAID, STOPS, DONE]));
    assert_eq!(ask(&balancer, model).await.end(), End::Complete);
    let other = Place {
        tenant: "other".into(),
        ..of_model(model, "{}")
    };
    let refused = balancer.refusal(&other).await;
    assert_eq!(refused.reason(), RefusalReason::RefusalWrongTenant);
    assert_eq!(ask(&balancer, model).await.end(), End::Complete);
}

#[tokio::test]
async fn who_is_to_share_its_cache_can_be_said() {
    let engine = Scripted::llama().await;
    let check = async |tenant: &str, taken: bool| {
        let agent = Agent::set_up(engine.address, |setup| {
            setup.manner = Manner {
                tenant: Some(tenant.into()),
                ..Manner::default()
            };
        })
        .await;
        let balancer = agent.balancer("b1").await;
        let mut placed = balancer.offer(&of_model("tiny/tiny.gguf", "{}")).await;
        let frame = placed.next().await.unwrap();
        assert_eq!(
            frame.kind == forebay_proto::frame::Kind::Accepted,
            taken,
            "{tenant}"
        );
    };
    check("*", true).await;
    check("t", true).await;
    check("another", false).await;
}

#[tokio::test]
async fn a_restart_is_seen_by_counters_that_go_back() {
    let engine = Scripted::llama().await;
    let agent = beside(&engine).await;
    let mut status = agent.work.status();
    let until = async |status: &mut tokio::sync::watch::Receiver<forebay_worker_agent::Status>,
                       wanted| {
        let there = status.wait_for(|status| status.observed == wanted);
        drop(
            tokio::time::timeout(PATIENCE, there)
                .await
                .unwrap()
                .unwrap(),
        );
    };
    use forebay_proto::wire::fleet::Observed;
    until(&mut status, Observed::Ready).await;
    // It was read once.
    engine.until_read("/metrics", 3).await;
    engine.metrics(include_str!("samples/llama-metrics.txt").replace(" 183\n", " 0\n"));
    until(&mut status, Observed::EngineDown).await;
    until(&mut status, Observed::Ready).await;
}

#[tokio::test]
async fn an_engine_is_told_what_goes_first_where_that_is_wanted() {
    let engine = Scripted::vllm().await;
    let agent = Agent::set_up(engine.address, |setup| {
        setup.manner = Manner {
            priority: true,
            ..Manner::default()
        };
    })
    .await;
    let balancer = agent.balancer("b1").await;
    engine.says(Says::events(&[SAID, STOPS, DONE]));
    let priority = async |ttft_ms| {
        let body = r#"{"priority":-5,"stream":true}"#;
        let place = Place {
            ttft_target_ms: ttft_ms,
            ..of_model("tiny", body)
        };
        let mut placed = balancer.offer(&place).await;
        placed.accepted().await;
        placed.send_body(body).await;
        assert_eq!(placed.answer().await.end(), End::Complete);
        let seen: serde_json::Value = serde_json::from_str(&engine.asked().body).unwrap();
        seen["priority"].as_i64().unwrap()
    };
    let (soon, later, whenever) = (
        priority(Some(100)).await,
        priority(Some(60_000)).await,
        priority(None).await,
    );
    assert!(0 < soon && soon < later, "{soon} {later}");
    assert_eq!(whenever, i64::from(i32::MAX));
}

#[tokio::test]
async fn an_engine_that_makes_no_progress_is_not_waited_for_though_its_health_is_good() {
    let engine = Scripted::llama().await;
    let agent = Agent::set_up(engine.address, |setup| {
        setup.manner = Manner::default();
        setup.patience = Patience {
            looks: Duration::from_millis(50),
            stall: Duration::from_millis(600),
            ..Patience::default()
        };
    })
    .await;
    let balancer = agent.balancer("b1").await;
    let model = "tiny/tiny.gguf";
    engine.hangs(true, true);
    let body = "{}";
    let mut placed = balancer.offer(&of_model(model, body)).await;
    placed.accepted().await;
    placed.send_body(body).await;
    // A long prefill: nothing is said, and counters go on.
    let said = tokio::time::timeout(Duration::from_millis(1_500), placed.receiver.recv()).await;
    assert!(said.is_err(), "it works, and is waited for");
    engine.hangs(true, false);
    let answer = placed.answer().await;
    assert_eq!(answer.end(), End::EngineFailed);
    let refused = balancer.refusal(&of_model(model, body)).await;
    assert_eq!(refused.reason(), RefusalReason::RefusalEngineDown);

    engine.says(Says::of(200, r#"{"choices":[{"finish_reason":"length"}]}"#));
    engine.hangs(false, false);
    let mut status = agent.work.status();
    let ready = |status: &forebay_worker_agent::Status| {
        status.observed == forebay_proto::wire::fleet::Observed::Ready
    };
    // The token that it is asked for may have to be waited for in vain once.
    let back = tokio::time::timeout(2 * PATIENCE, status.wait_for(ready)).await;
    drop(back.unwrap().unwrap());
}

#[tokio::test]
async fn an_engine_without_counters_is_judged_by_what_it_had_begun_to_say() {
    let engine = Scripted::unknown().await;
    let agent = Agent::set_up(engine.address, |setup| {
        setup.manner = Manner::default();
        setup.patience = Patience {
            looks: Duration::from_millis(50),
            stall: Duration::from_millis(300),
            ..Patience::default()
        };
    })
    .await;
    let balancer = agent.balancer("b1").await;
    engine.hangs(true, false);
    let body = "{}";
    let mut placed = balancer.offer(&of_model("any", body)).await;
    placed.accepted().await;
    placed.send_body(body).await;
    // Perhaps it makes a long answer that comes whole.
    let said = tokio::time::timeout(Duration::from_millis(1_500), placed.receiver.recv()).await;
    assert!(said.is_err(), "nobody knows whether it works");
    engine.says(Says::events(&[SAID]).and_hangs());
    let place = Place {
        stream: true,
        ..of_model("any", body)
    };
    engine.hangs(false, false);
    let mut streamed = balancer.offer(&place).await;
    streamed.accepted().await;
    streamed.send_body(body).await;
    let answer = streamed.answer().await;
    assert_eq!(
        (answer.end(), answer.text),
        (End::EngineFailed, SAID.as_bytes().to_vec())
    );
}
