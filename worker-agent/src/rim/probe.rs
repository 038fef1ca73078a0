//! Whether the engine answers, and what it serves.

use std::sync::Arc;
use std::time::Duration;

use forebay_link::Backoff;
use rand::SeedableRng;
use rand::rngs::StdRng;

use super::engine::{Engine, models};
use super::pool::CallError;
use super::work::Shared;

/// Between two looks at an engine that answers.
const EVERY: Duration = Duration::from_secs(1);
/// The models are read again at each such look, and whenever the engine came back.
const MODELS_EVERY: u32 = 10;
const PATIENCE: Duration = Duration::from_secs(2);
/// A busy engine may be late; so many times in a row it is down.
const LATE_IN_A_ROW: u32 = 3;

/// Looks at the engine for as long as the work side lives.
pub(super) async fn keep_probing(shared: Arc<Shared>) {
    let mut rng = StdRng::from_os_rng();
    let mut backoff = Backoff::new(Duration::from_millis(100), Duration::from_secs(2));
    loop {
        let names = match read_models(&shared.engine).await {
            Ok(names) => names,
            Err(problem) => {
                shared.engine_down(&problem);
                tokio::time::sleep(backoff.next(&mut rng)).await;
                continue;
            }
        };
        backoff.reset();
        shared.engine_up(&names);
        watch_health(&shared).await;
    }
}

/// Returns when the models are to be read again: from time to time, or when the engine fails.
async fn watch_health(shared: &Shared) {
    let mut late = 0;
    for _ in 0..MODELS_EVERY {
        tokio::time::sleep(EVERY).await;
        match look(&shared.engine).await {
            Ok(()) => late = 0,
            Err(CallError::NotStarted(problem)) => return shared.engine_down(&problem),
            Err(CallError::Failed(problem)) => {
                late += 1;
                if late >= LATE_IN_A_ROW {
                    return shared.engine_down(&problem);
                }
            }
        }
        if !shared.engine_is_up() {
            return;
        }
    }
}

/// `/health` where there is one, else the list of models.
async fn look(engine: &Engine) -> Result<(), CallError> {
    let mut page = "/health";
    let mut status = engine.get(page, PATIENCE).await?.status;
    if matches!(status, 404 | 405) {
        page = "/v1/models";
        status = engine.get(page, PATIENCE).await?.status;
    }
    if (200..300).contains(&status) {
        Ok(())
    } else {
        Err(CallError::Failed(format!("{page} answers {status}")))
    }
}

async fn read_models(engine: &Engine) -> Result<Vec<String>, String> {
    let document = engine.get("/v1/models", PATIENCE).await;
    let document = document.map_err(|error| error.to_string())?;
    match document.status {
        200 => models(&document.body).map_err(ToOwned::to_owned),
        status => Err(format!("/v1/models answers {status}")),
    }
}

/// The engine's models, as soon as it answers.
pub(super) async fn first_models(engine: &Engine) -> Vec<String> {
    let mut rng = StdRng::from_os_rng();
    let mut backoff = Backoff::new(Duration::from_millis(100), Duration::from_secs(2));
    let mut said = false;
    loop {
        match read_models(engine).await {
            Ok(names) => return names,
            Err(problem) if !said => {
                said = true;
                tracing::warn!(problem, "waiting for the engine");
            }
            Err(_) => {}
        }
        tokio::time::sleep(backoff.next(&mut rng)).await;
    }
}
