//! What the agent learns of an engine of which it sees nothing but the API, over real QUIC and HTTP.

#![allow(
    clippy::disallowed_methods,
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stderr,
    unreachable_pub,
    dead_code
)] // a test of the rims: sockets and clocks

mod common;

use common::*;
use forebay_proto::wire::work::{LoadReport, Place, Trailer};
use forebay_scheduler::Load;
use forebay_scheduler::model::{Backlog, Profile};
use forebay_worker_agent::Patience;

/// The engine is half as fast as the agent is told.
const SPEED: f64 = 2.0;
const TOLD: f64 = 4.0;

/// A prompt of about so many tokens that shares nothing with others.
fn text(number: u64, tokens: usize) -> String {
    let mut state = number;
    let mut text = String::new();
    while text.len() < tokens * 4 {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        text += &format!("{:08x}", state >> 32);
    }
    text
}

async fn serve(balancer: &Balancer, number: u64, tokens: usize) -> Trailer {
    let text = text(number, tokens);
    let body = format!(
        r#"{{"model":"m","stream":true,"max_tokens":12,"messages":[{{"role":"user","content":"{text}"}}]}}"#
    );
    let place = Place {
        prompt_tokens: tokens as u32 + 10,
        prompt_bytes: text.len() as u64,
        chunk_bytes: 256,
        stream: true,
        max_tokens: 12,
        expected_ttft_ms: None,
        ttft_target_ms: Some(2_000),
        tpot_target_ms: Some(500),
        ..place(body.len())
    };
    let mut placed = balancer.offer(&place).await;
    placed.accepted().await;
    placed.send_body(&body).await;
    placed.answer().await.trailer.unwrap()
}

fn load(report: Option<&LoadReport>) -> Load {
    Load::from_wire(report.unwrap()).unwrap()
}

/// The median of predicted ÷ measured - 1, without its sign, over prompts that the agent did not learn
/// from.
async fn deviation() -> f64 {
    let engine = Engine::start(([127, 0, 0, 1], 0).into(), |config| config.speed = SPEED).await;
    let told = Profile::default().at_speed(TOLD);
    let agent = Agent::with(engine.address, 8, 64, Patience::default(), Some(told)).await;
    let balancer = agent.balancer("b1").await;
    let sizes = [300, 1_200, 3_000, 700, 5_000, 2_000];
    for round in 0..12 {
        // Two at a time, so that some decode while others prefill.
        let number = round * 10;
        let size = |at: u64| sizes[((round + at) % 6) as usize];
        tokio::join!(
            serve(&balancer, number, size(0)),
            serve(&balancer, number + 1, size(1))
        );
    }
    let mut learnt = load(serve(&balancer, 999, 500).await.load.as_ref());
    let mut off = Vec::new();
    for (number, tokens) in (1_000..).zip([800, 1_500, 2_500, 4_000, 6_000, 1_000, 3_500]) {
        let model = learnt.model.unwrap();
        let predicted = model.ttft_ms(&Backlog::default(), 0.0, tokens as f64 + 10.0);
        let trailer = serve(&balancer, number, tokens).await;
        let actual = f64::from(trailer.queue_ms + trailer.first_byte_ms);
        eprintln!("{tokens} tokens: {predicted:.0} ms predicted, {actual:.0} ms measured");
        off.push((predicted / actual - 1.0).abs());
        learnt = load(trailer.load.as_ref());
    }
    eprintln!("{:?} {:?}", learnt.model, learnt.residuals);
    off.sort_by(f64::total_cmp);
    off[off.len() / 2]
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_model_that_is_reported_predicts_an_engine_that_is_half_as_fast_as_was_told() {
    let mut tries = Vec::new();
    // A machine that is busy with something else for a moment says nothing of the agent.
    for _ in 0..3 {
        let off = deviation().await;
        if off <= 0.15 {
            return;
        }
        tries.push(off);
    }
    panic!("off by {tries:?}");
}
