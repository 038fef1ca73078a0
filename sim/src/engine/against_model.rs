//! The emulated engine through its HTTP API against the model alone: what the sockets and the clock
//! add must be little.
#![allow(clippy::disallowed_methods)] // a test of the rims: sockets and clocks

use std::collections::BTreeMap;
use std::time::Duration;

use forebay_proto::Now;
use tokio::sync::oneshot;

use super::request::{Api, Served};
use super::{Config, serve};
use crate::model::{Arrival, Engine, Event};
use crate::replay::{self, Endpoint, OneRequest, Options, Plan};
use crate::trace::Trace;

/// What one request met with, in milliseconds.
#[derive(Clone, Copy, Debug)]
struct Times {
    ttft: f64,
    tpot: Option<f64>,
    cached: u64,
}

/// A real trace whose prompts share, overlap and queue, cut to what fits a few seconds.
fn trace() -> Trace {
    let mut trace = Trace::sample(Some(60)).unwrap();
    for request in &mut trace.requests {
        request.input_tokens = request.input_tokens.min(12_000);
        request.output_tokens = request.output_tokens.clamp(2, 60);
    }
    trace
}

fn config() -> Config {
    Config {
        models: vec!["m".to_owned()],
        // Iterations of 5 ms and more: a timer of 1 ms is fine enough.
        speed: 4.0,
        ..Config::default()
    }
}

async fn measured() -> Vec<OneRequest> {
    let (sender, ready) = oneshot::channel();
    let serving = serve(
        config(),
        |at| sender.send(at).unwrap(),
        std::future::pending(),
    );
    let engine = tokio::spawn(serving);
    let target = format!("http://{}", ready.await.unwrap());
    let config = replay::Config {
        speed: 3.0,
        jitter: Some(1),
        ..replay::Config::new(trace(), target)
    };
    let mut lines = Vec::new();
    let report = replay::run_each(config, |_| {}, |line| lines.push(line))
        .await
        .unwrap();
    engine.abort();
    assert_eq!(report.errors, 0, "{:?}", report.errors_by);
    lines.sort_by(|one, other| one.start_ms.partial_cmp(&other.start_ms).unwrap());
    lines
}

/// The same requests at the same moments, without sockets.
fn modelled(lines: &[OneRequest]) -> BTreeMap<u64, Times> {
    let config = config();
    let served = Served {
        models: &config.models,
        max_context_tokens: config.max_context_tokens,
        block_tokens: config.block_tokens,
        keeps_ids: false,
    };
    let options = Options {
        model: "m".to_owned(),
        speed: 3.0,
        limit: None,
        jitter: Some(1),
        endpoint: Endpoint::Chat,
        verify: false,
    };
    let jobs: BTreeMap<u64, _> = Plan::new(trace(), options)
        .map(|planned| {
            let job = served.job(Api::Chat, &planned.body);
            (planned.index, job.unwrap_or_else(|error| panic!("{error}")))
        })
        .collect();
    let mut engine = Engine::new(config.settings());
    let mut events = Vec::new();
    let at = |ms: f64| Now::at(Duration::from_secs_f64(ms / 1e3));
    for line in lines {
        let now = at(line.start_ms.unwrap());
        engine.advance(now, &mut events);
        let job = &jobs[&line.index];
        let arrival = Arrival {
            id: line.index,
            prompt_tokens: job.prompt_tokens as u32,
            blocks: job.blocks.clone(),
            output_tokens: job.max_tokens as u32,
        };
        assert!(engine.arrive(now, arrival));
    }
    while let Some(next) = engine.next_deadline() {
        engine.advance(next, &mut events);
    }
    let ms = |now: Now| now.since(Now::default()).as_secs_f64() * 1e3;
    let (mut first, mut last, mut said) = (BTreeMap::new(), BTreeMap::new(), BTreeMap::new());
    for event in events {
        match event {
            Event::First {
                id,
                at,
                cached_tokens,
            } => {
                first.insert(id, (ms(at), cached_tokens));
                last.insert(id, ms(at));
                said.insert(id, 1.0);
            }
            Event::Token { id, at } => {
                last.insert(id, ms(at));
                *said.entry(id).or_insert(0.0) += 1.0;
            }
            Event::Finished { .. } => {}
        }
    }
    let times = |line: &OneRequest| {
        let (at, cached) = first[&line.index];
        let tokens: f64 = said[&line.index];
        let decode = last[&line.index] - at;
        Times {
            ttft: at - line.start_ms.unwrap(),
            tpot: (tokens > 1.0).then(|| decode / (tokens - 1.0)),
            cached: cached.into(),
        }
    };
    lines.iter().map(|line| (line.index, times(line))).collect()
}

fn mean(values: impl Iterator<Item = f64>) -> f64 {
    let (sum, count) = values.fold((0.0, 0.0), |(sum, count), value| (sum + value, count + 1.0));
    sum / count
}

fn quantile(values: impl Iterator<Item = f64>, q: f64) -> f64 {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    values[((values.len() - 1) as f64 * q).round() as usize]
}

/// The largest deviation of a figure, and what was compared.
async fn deviation() -> (f64, String) {
    let lines = measured().await;
    let model = modelled(&lines);
    let real = |line: &OneRequest| {
        let first = line.first_byte_ms.unwrap();
        let tokens = line.output_tokens.unwrap() as f64;
        Times {
            ttft: first - line.start_ms.unwrap(),
            // The last token and the end of the answer leave together.
            tpot: (tokens > 1.0).then(|| (line.end_ms.unwrap() - first) / (tokens - 1.0)),
            cached: line.cached_tokens.unwrap(),
        }
    };
    let real: Vec<Times> = lines.iter().map(real).collect();
    let model: Vec<Times> = lines.iter().map(|line| model[&line.index]).collect();
    let ttft = |times: &[Times]| times.iter().map(|t| t.ttft).collect::<Vec<f64>>();
    let tpot = |times: &[Times]| times.iter().filter_map(|t| t.tpot).collect::<Vec<f64>>();
    let cached = |times: &[Times]| times.iter().map(|t| t.cached as f64).sum::<f64>();
    let mut worst: f64 = 0.0;
    let mut said = String::new();
    let mut compare = |what: &str, real: f64, model: f64| {
        worst = worst.max((real / model - 1.0).abs());
        said += &format!("{what}: {real:.2} measured, {model:.2} modelled\n");
    };
    for (what, of) in [("ttft", ttft as fn(&[Times]) -> Vec<f64>), ("tpot", tpot)] {
        compare(
            what,
            mean(of(&real).into_iter()),
            mean(of(&model).into_iter()),
        );
        for q in [0.5, 0.9] {
            let (real, model) = (of(&real).into_iter(), of(&model).into_iter());
            compare(
                &format!("{what} p{}", q * 100.0),
                quantile(real, q),
                quantile(model, q),
            );
        }
    }
    compare("cached tokens", cached(&real), cached(&model));
    (worst, said)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_engine_through_its_api_takes_what_the_model_says_within_5_percent() {
    let mut tries = Vec::new();
    // A machine that is busy with something else for a moment says nothing of the engine.
    for _ in 0..3 {
        let (worst, said) = deviation().await;
        eprintln!("{said}worst: {:.1} %", worst * 100.0);
        if worst <= 0.05 {
            return;
        }
        tries.push(said);
    }
    panic!("{}", tries.join("\n"));
}
