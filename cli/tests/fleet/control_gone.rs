//! Requests for as long as one likes without a control plane, beside the same requests with one.

use std::time::Duration;

use forebay_proto::wire::fleet::Desired;
use serde_json::Value;

use crate::failures::{Load, Writer, workers};
use crate::harness::{Fleet, within};

/// The recorded span of the shipped trace of agents, whose conversations share long prefixes.
const SAMPLE: (&str, f64) = ("lmcache-agents", 204.0);

/// The same requests at the same time to two fleets, of which one lost every control node before the
/// first. `FOREBAY_GONE_SECONDS` sets how long they take, `FOREBAY_GONE_TRACE` another trace and the
/// seconds of it: `FILE:SECONDS`.
#[test]
fn placement_is_as_good_for_as_long_as_the_control_plane_is_gone() {
    let variable = |name: &str| std::env::var(name).ok();
    let seconds = variable("FOREBAY_GONE_SECONDS").map_or(20.0, |text| text.parse().unwrap());
    let trace = variable("FOREBAY_GONE_TRACE");
    let (trace, span) = trace.as_deref().map_or(SAMPLE, |text| {
        let (file, span) = text.rsplit_once(':').unwrap();
        (file, span.parse().unwrap())
    });
    let speed: f64 = span / seconds;
    // Engines no slower than recorded, and not idle where the trace is replayed faster.
    let engine = speed.max(1.0).to_string();
    let fleet = ["--control", "3", "--balancers", "2", "--workers", "4"];
    let args = [&fleet[..], &["--engine-speed", &engine]].concat();
    let up = Fleet::start(&args);
    let gone = Fleet::start_beside(&up, &args);
    up.wait_for_control(3);
    gone.wait_for_control(3);
    let before = (workers(&gone), gone.json(&["status"])["cluster_id"].clone());
    for node in ["c1", "c2", "c3"] {
        gone.kill(node);
    }

    let slice = [trace, "--speed", &speed.to_string()];
    let (with, without) = (Load::of(&up, &slice), Load::of(&gone, &slice));
    let (with, without) = (with.without_errors(), without.without_errors());
    assert_eq!(
        gone.run(&["status"]).status.code(),
        Some(7),
        "gone all the while"
    );
    eprintln!("with a control plane: {with}\nwithout, for {seconds} s: {without}");
    let number = |report: &Value, path: &str| report.pointer(path).unwrap().as_f64().unwrap();
    let each = |path: &str| [&with, &without].map(|report| number(report, path));
    let [hits_with, hits_without] = each("/cached_token_ratio");
    assert!(
        hits_without > hits_with - 0.05,
        "{hits_without} of {hits_with}"
    );
    let [ttft_with, ttft_without] = each("/ttft_ms/mean");
    assert!(
        ttft_without < ttft_with * 1.3 + 50.0,
        "{ttft_without} ms, {ttft_with} with one"
    );

    gone.start_again(&["c1", "c2", "c3"]);
    gone.wait_for_control(3);
    within(Duration::from_secs(20), "all is as before", || {
        let after = (workers(&gone), gone.json(&["status"])["cluster_id"].clone());
        (after == before).then_some(())
    });
    Writer::new(&gone).set_desired("w1", Desired::Cordoned);
}
