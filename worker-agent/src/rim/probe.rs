//! Whether the engine answers, who it is, and what it serves.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use forebay_link::Backoff;
use rand::SeedableRng;
use rand::rngs::StdRng;
use tokio::time::Instant;

use super::engine::Engine;
use super::found::{self, Found};
use super::pool::CallError;
use super::work::{Patience, Shared};
use crate::adapter::Adapter;
use crate::core::{Progress, Pulse};

/// The models are read again at each such look, and whenever the engine came back.
const MODELS_EVERY: u32 = 10;
/// So often the metrics page is read: vLLM takes tens of milliseconds to write it.
const METRICS_EVERY: u32 = 5;
/// A busy engine may be late; so many times in a row it is down.
const LATE_IN_A_ROW: u32 = 3;
/// So often the engine is asked again who it is, and how it renders prompts: dates stand in some templates.
const ASK_AGAIN: Duration = Duration::from_secs(24 * 3600);
/// For one token, from an engine that has nothing else to do.
const PROOF: Duration = Duration::from_secs(10);

/// Looks at the engine for as long as the work side lives.
pub(super) async fn keep_probing(shared: Arc<Shared>) {
    let mut rng = StdRng::from_os_rng();
    let mut backoff = Backoff::new(Duration::from_millis(100), Duration::from_secs(2));
    loop {
        match look(&shared).await {
            Ok(found) => {
                backoff.reset();
                if let Some(process) = shared.engine.process() {
                    process.answers();
                }
                // Before anything is placed on it: what is known of its cache depends on it.
                shared.find_events(&found).await;
                shared.engine_found(&found);
                watch_health(&shared).await;
            }
            Err(problem) => {
                shared.engine_down(&problem.to_string());
                if let Some(process) = shared.engine.process() {
                    process.is_late();
                }
                tokio::time::sleep(backoff.next(&mut rng)).await;
            }
        }
    }
}

/// Who the engine is; one that answers and did no work has to do some first.
async fn look(shared: &Shared) -> Result<Found, CallError> {
    let found = found::ask(
        &shared.engine,
        shared.manner.kind.as_deref(),
        shared.patience.look,
    )
    .await?;
    if shared.is_doubted() {
        prove(&shared.engine, &found.models[0]).await?;
        shared.trusts();
    }
    Ok(found)
}

/// Has the engine make one token: a health page is answered by a process that may have no engine any more.
async fn prove(engine: &Engine, model: &str) -> Result<(), CallError> {
    let body = serde_json::json!({"model": model, "prompt": "a", "max_tokens": 1});
    let body = Bytes::from(body.to_string());
    let answer = engine.ask("/v1/completions", body, PROOF).await?;
    // One that knows no completions says so, which has to do.
    if answer.status < 500 {
        return Ok(());
    }
    let problem = format!("it answers {} to a request for one token", answer.status);
    Err(CallError::Failed(problem))
}

/// Returns when the engine failed, may be another one, or is to be asked again who it is.
async fn watch_health(shared: &Shared) {
    let Patience { look, looks, .. } = shared.patience;
    let every = match shared.adapter() {
        // A small page, by which alone it is seen that it started anew.
        Adapter::LlamaCpp => 1,
        Adapter::Vllm | Adapter::Sglang | Adapter::Generic => METRICS_EVERY,
    };
    let (mut late, mut work) = (0, 0);
    let asked = Instant::now();
    for turn in 1_u32.. {
        tokio::time::sleep(looks).await;
        let looked = if turn.is_multiple_of(MODELS_EVERY) {
            let listing = found::listing(&shared.engine, look).await;
            listing.map(|listing| shared.engine_up(&listing.models))
        } else {
            ask_health(&shared.engine, look).await
        };
        match looked {
            Ok(()) => {
                late = 0;
                if let Some(process) = shared.engine.process() {
                    process.answers();
                }
            }
            Err(CallError::NotStarted(problem)) => return shared.engine_down(&problem),
            Err(CallError::Failed(problem)) => {
                late += 1;
                if late >= LATE_IN_A_ROW {
                    return shared.engine_down(&problem);
                }
            }
        }
        if !shared.engine_is_up() || asked.elapsed() >= ASK_AGAIN {
            return;
        }
        if late == 0
            && turn.is_multiple_of(every)
            && let Some(gauges) = found::gauges(&shared.engine, look).await
        {
            // It may have started anew between two looks.
            if let Some(process) = found::process(&shared.engine, &gauges) {
                shared.engine_is(Some(process));
            } else if gauges.work.is_some_and(|done| done < work) {
                return shared.engine_down("its counters went back: it started anew");
            }
            work = gauges.work.unwrap_or(work);
            shared.engine_shows(&gauges);
        }
    }
}

/// Watches whether the engine makes progress, for as long as the work side lives.
pub(super) async fn watch_progress(shared: Arc<Shared>) {
    let Patience {
        look, looks, stall, ..
    } = shared.patience;
    let mut progress = Progress::default();
    loop {
        tokio::time::sleep(looks).await;
        let pulse = shared.with(|core, now| {
            let expected = if shared.counts() {
                core.running()
            } else {
                core.telling()
            };
            progress.look(now, expected, shared.last_heard(), stall)
        });
        match pulse {
            Pulse::Good => {}
            Pulse::Faint => {
                let gauges = found::gauges(&shared.engine, look).await;
                if let Some(work) = gauges.and_then(|gauges| gauges.work) {
                    progress.counted(shared.now(), work);
                }
            }
            Pulse::None => {
                progress.forget();
                shared.engine_stalled();
            }
        }
    }
}

/// `/health` where there is one, else the list of models.
async fn ask_health(engine: &Engine, patience: Duration) -> Result<(), CallError> {
    let mut page = "/health";
    let mut status = engine.get(page, patience).await?.status;
    if matches!(status, 404 | 405) {
        page = "/v1/models";
        status = engine.get(page, patience).await?.status;
    }
    if (200..300).contains(&status) {
        Ok(())
    } else {
        Err(CallError::Failed(format!("{page} answers {status}")))
    }
}

/// Who the engine is, as soon as it answers.
pub(super) async fn first_found(engine: &Engine, chosen: Option<&str>) -> Found {
    let mut rng = StdRng::from_os_rng();
    let mut backoff = Backoff::new(Duration::from_millis(100), Duration::from_secs(2));
    let mut said = false;
    loop {
        match found::ask(engine, chosen, Patience::default().look).await {
            Ok(found) => return found,
            Err(problem) => {
                if !std::mem::replace(&mut said, true) {
                    tracing::warn!(%problem, "waiting for the engine");
                }
                if let Some(process) = engine.process() {
                    process.is_late();
                }
            }
        }
        tokio::time::sleep(backoff.next(&mut rng)).await;
    }
}
