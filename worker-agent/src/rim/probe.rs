//! Whether the engine answers, and what it serves.

use std::sync::Arc;
use std::time::Duration;

use forebay_link::Backoff;
use rand::SeedableRng;
use rand::rngs::StdRng;

use super::engine::{Engine, models, started};
use super::pool::CallError;
use super::work::{Patience, Shared};

/// The models are read again at each such look, and whenever the engine came back.
const MODELS_EVERY: u32 = 10;
/// A busy engine may be late; so many times in a row it is down.
const LATE_IN_A_ROW: u32 = 3;

/// Looks at the engine for as long as the work side lives.
pub(super) async fn keep_probing(shared: Arc<Shared>) {
    let mut rng = StdRng::from_os_rng();
    let mut backoff = Backoff::new(Duration::from_millis(100), Duration::from_secs(2));
    let look = shared.patience.look;
    loop {
        match read_models(&shared.engine, look).await {
            Ok(names) => {
                backoff.reset();
                // Before anything is placed on it: what is known of its cache depends on it.
                shared.find_events(look).await;
                shared.engine_is(ask_process(&shared.engine, look).await);
                shared.engine_up(&names);
                watch_health(&shared).await;
            }
            Err(problem) => {
                shared.engine_down(&problem.to_string());
                tokio::time::sleep(backoff.next(&mut rng)).await;
            }
        }
    }
}

/// Returns when the engine failed, so that its models are to be read anew.
async fn watch_health(shared: &Shared) {
    let Patience { look, looks, .. } = shared.patience;
    let mut late = 0;
    for turn in 1_u32.. {
        tokio::time::sleep(looks).await;
        let looked = if turn.is_multiple_of(MODELS_EVERY) {
            let names = read_models(&shared.engine, look).await;
            // It may have started anew between two looks.
            if let Some(process) = ask_process(&shared.engine, look).await {
                shared.engine_is(Some(process));
            }
            names.map(|names| shared.engine_up(&names))
        } else {
            ask_health(&shared.engine, look).await
        };
        match looked {
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

/// Which process the engine is, where it says; a page that is late is asked for twice.
pub(super) async fn ask_process(engine: &Engine, patience: Duration) -> Option<String> {
    for _ in 0..2 {
        if let Ok(page) = engine.get("/metrics", patience).await {
            let since = started(&page.body).filter(|_| page.status == 200);
            return since.map(|since| format!("{} since {since}", engine.address()));
        }
    }
    None
}

async fn read_models(engine: &Engine, patience: Duration) -> Result<Vec<String>, CallError> {
    let document = engine.get("/v1/models", patience).await?;
    let problem = match document.status {
        200 => match models(&document.body) {
            Ok(names) => return Ok(names),
            Err(problem) => problem.to_owned(),
        },
        status => format!("/v1/models answers {status}"),
    };
    Err(CallError::Failed(problem))
}

/// The engine's models, as soon as it answers.
pub(super) async fn first_models(engine: &Engine) -> Vec<String> {
    let mut rng = StdRng::from_os_rng();
    let mut backoff = Backoff::new(Duration::from_millis(100), Duration::from_secs(2));
    let mut said = false;
    loop {
        match read_models(engine, Patience::default().look).await {
            Ok(names) => return names,
            Err(problem) if !said => {
                said = true;
                tracing::warn!(%problem, "waiting for the engine");
            }
            Err(_) => {}
        }
        tokio::time::sleep(backoff.next(&mut rng)).await;
    }
}
