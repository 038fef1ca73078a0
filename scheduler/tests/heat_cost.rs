//! What a request costs an agent for the heat of its families.

#![allow(clippy::disallowed_methods)] // it measures

use std::time::{Duration, Instant};

use forebay_proto::Now;
use forebay_scheduler::heat::{Arrived, Heat};
use forebay_scheduler::residency::Spread;

/// Chunks of the prompts: 100 kB.
const CHUNKS: u64 = 400;
const REQUESTS: u64 = 20_000;

/// Turn `turn` of a conversation in one of eight families: a shared beginning, then its own, longer each turn.
fn prompt(conversation: u64, turn: u64, into: &mut Vec<u64>) {
    let family = conversation % 8;
    let mix = |path: u64, chunk: u64| {
        let mut z = path
            .wrapping_mul(0x9e37_79b9_7f4a_7c15)
            .wrapping_add(chunk.wrapping_mul(0xbf58_476d_1ce4_e5b9));
        z = (z ^ (z >> 31)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 29)
    };
    into.clear();
    into.extend((0..100).map(|chunk| mix(family + 1, chunk)));
    let own = (CHUNKS - 180) + 10 * turn;
    into.extend((0..own).map(|chunk| mix(1_000 + conversation, chunk)));
}

#[test]
fn a_prompt_of_400_chunks_costs_microseconds() {
    let mut heat = Heat::default();
    let (mut chunks, mut spent, mut most) = (Vec::new(), Duration::ZERO, Duration::ZERO);
    for n in 0..REQUESTS {
        // Some 400 conversations at a time, eight turns each, in turns.
        let (wave, turn) = (n / 3_200, n % 3_200 / 400);
        prompt(wave * 400 + n % 400, turn, &mut chunks);
        let arrived = Arrived {
            chunks: &chunks,
            key_epoch: 1,
            spread: Spread {
                prompt_tokens: 25_000,
                prompt_bytes: 100_000,
                chunk_bytes: 256,
            },
            cached_tokens: 6_000,
            output_tokens: 300,
            ttft_target_ms: 2_000.0,
        };
        let now = Now::at(Duration::from_millis(1_000_000 + n * 100));
        let began = Instant::now();
        let mut ticket = heat.arrived(now, &arrived);
        heat.took(now, &mut ticket, 500.0);
        let took = began.elapsed();
        spent += took;
        most = most.max(took);
    }
    let each = spent.as_secs_f64() * 1e6 / REQUESTS as f64;
    let began = Instant::now();
    let told = heat.told(Now::at(Duration::from_secs(3_000)), |_| None);
    let telling = began.elapsed();
    println!(
        "{each:.2} us for each arrival in the mean, {most:?} at most; told in {telling:?}, {:?} nodes, chunks, requests",
        heat.size()
    );
    assert!(!told.families.is_empty());
    // 2.3 us in release on a machine with other work; 36 us without optimisation.
    assert!(each < 400.0, "{each} us");
}
