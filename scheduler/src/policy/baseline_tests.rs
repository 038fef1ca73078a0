//! Each published rule's own claims, with its authors' constants.

use super::tests::{PROMPT, check, check_promised, least, prompt, scores, scores_by, worker};
use super::*;

#[test]
fn sglang_follows_a_match_of_more_than_half_while_the_fleet_is_balanced() {
    let half = PROMPT / 2.0;
    check(
        "sglang",
        &[worker(33, 0.0, 0.0, half + 1.0), worker(1, 0.0, 0.0, 0.0)],
        Some(0),
    );
    check(
        "sglang",
        &[worker(34, 0.0, 0.0, half + 1.0), worker(1, 0.0, 0.0, 0.0)],
        Some(1),
    );
}

#[test]
fn sglang_grows_the_smallest_tree_without_a_match() {
    let tree = |recent_ms, present, cached| Candidate {
        recent_ms,
        ..worker(present, 0.0, 0.0, cached)
    };
    check(
        "sglang",
        &[tree(900.0, 0, PROMPT / 2.0), tree(100.0, 9, 0.0)],
        Some(1),
    );
    check(
        "sglang",
        &[tree(100.0, 2, 0.0), tree(100.0, 1, 0.0)],
        Some(1),
    );
}

#[test]
fn dynamo_adds_blocks_to_prefill_and_blocks_that_decode() {
    // 3,200 tokens held save 200 blocks, which is what 3,200 pending ones cost, or so many decoded.
    check(
        "dynamo",
        &[worker(1, 3_200.0, 0.0, 3_200.0), worker(0, 0.0, 0.0, 0.0)],
        None,
    );
    check(
        "dynamo",
        &[worker(1, 3_000.0, 0.0, 3_200.0), worker(0, 0.0, 0.0, 0.0)],
        Some(0),
    );
    check(
        "dynamo",
        &[worker(4, 0.0, 4.0, 3_200.0), worker(0, 0.0, 0.0, 0.0)],
        Some(1),
    );
}

#[test]
fn lmetric_multiplies_what_is_to_prefill_by_the_batch() {
    // (0 + 1,000) × 4 against (0 + 4,000) × 1.
    check(
        "lmetric",
        &[worker(3, 0.0, 0.0, 3_000.0), worker(0, 0.0, 0.0, 0.0)],
        None,
    );
    check(
        "lmetric",
        &[worker(2, 0.0, 0.0, 3_000.0), worker(0, 0.0, 0.0, 0.0)],
        Some(0),
    );
    check(
        "lmetric",
        &[worker(2, 500.0, 0.0, 3_000.0), worker(0, 0.0, 0.0, 0.0)],
        Some(1),
    );
}

#[test]
fn mooncake_takes_the_least_time_to_first_token_whatever_it_does_to_others() {
    let crowded = worker(200, 0.0, 60.0, 1_000.0);
    check("mooncake", &[crowded, worker(0, 0.0, 0.0, 0.0)], Some(0));
    check("forebay", &[crowded, worker(0, 0.0, 0.0, 0.0)], Some(1));
    check(
        "mooncake",
        &[worker(1, 2_000.0, 0.0, 1_000.0), worker(0, 0.0, 0.0, 0.0)],
        Some(1),
    );
}

#[test]
fn llumnix_goes_to_the_most_free_memory_for_each_in_the_batch() {
    let free = |kv_tokens, present, decodes| Candidate {
        kv_tokens,
        ..worker(present, 0.0, decodes, 0.0)
    };
    check(
        "llumnix",
        &[free(100e3, 10, 10.0), free(100e3, 5, 10.0)],
        Some(1),
    );
    check(
        "llumnix",
        &[free(400e3, 10, 10.0), free(100e3, 5, 10.0)],
        Some(0),
    );
    // Where nothing is known of the memory, all have the same.
    check("llumnix", &[free(0.0, 9, 9.0), free(0.0, 9, 8.0)], Some(1));
}

#[test]
fn aibrix_follows_the_longest_match_within_one_deviation_and_8_requests() {
    let other = worker(1, 0.0, 0.0, 0.0);
    let fleet = |present, cached| {
        [
            worker(present, 0.0, 0.0, cached),
            other,
            other,
            worker(3, 0.0, 0.0, 64.0),
        ]
    };
    // 9 and 1 are 8 apart, which is no imbalance; 9 is beyond 3.5 and a deviation of 3.3.
    check("aibrix", &fleet(9, 3_000.0), Some(3));
    check("aibrix", &fleet(3, 3_000.0), Some(0));
    check("aibrix", &[worker(10, 0.0, 0.0, 3_000.0), other], Some(1));
}

#[test]
fn preble_exploits_what_is_longer_than_the_rest_and_explores_else() {
    let booked = |recent_ms, cached| Candidate {
        recent_ms,
        ..worker(0, 0.0, 0.0, cached)
    };
    check(
        "preble",
        &[booked(90_000.0, 2_100.0), booked(0.0, 0.0)],
        Some(0),
    );
    check(
        "preble",
        &[booked(900.0, 2_100.0), booked(800.0, 2_100.0)],
        Some(1),
    );
    check(
        "preble",
        &[booked(90_000.0, 1_900.0), booked(0.0, 0.0)],
        Some(1),
    );
    check(
        "preble",
        &[booked(50.0, 1_900.0), booked(0.0, 0.0)],
        Some(0),
    );
}

#[test]
fn llm_d_stays_with_four_fifths_of_a_prompt_until_that_costs_five_seconds() {
    let warm = |pending| worker(1, pending, 1.0, 3_300.0);
    let cold = worker(1, 0.0, 1.0, 0.0);
    check("llm-d", &[warm(0.0), cold], Some(0));
    check("llm-d", &[warm(50_000.0), cold], Some(0));
    check("llm-d", &[warm(90_000.0), cold], Some(1));
    check("llm-d", &[worker(1, 20_000.0, 1.0, 3_100.0), cold], Some(1));
}

#[test]
fn llm_d_packs_up_to_the_promise_and_then_tries_the_idle() {
    let promised = |ttft_ms| Targets {
        ttft_ms,
        tpot_ms: 1_000.0,
    };
    let (busy, busier) = (worker(3, 2_000.0, 3.0, 0.0), worker(5, 6_000.0, 5.0, 0.0));
    check_promised("llm-d", promised(5_000.0), &[busy, busier], Some(1));
    check_promised("llm-d", promised(700.0), &[busy, busier], Some(0));
    check_promised("llm-d", promised(10.0), &[busy, busier], Some(0));
    let idle = worker(0, 9_000.0, 0.0, 0.0);
    check_promised("llm-d", promised(10.0), &[busy, busier, idle], Some(2));
}

#[test]
fn llm_d_explores_in_one_decision_of_a_hundred() {
    let fleet = [worker(1, 9_000.0, 1.0, 3_300.0), worker(1, 0.0, 1.0, 0.0)];
    assert_eq!(least(&scores("llm-d", &prompt(), &fleet)).0, 0);
    assert_eq!(least(&scores_by("llm-d", &prompt(), &fleet, [100, 1])).0, 1);
}
