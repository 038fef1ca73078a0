//! `forebay workers`: the workers that are registered, as the fleet agreed.

use clap::Args;
use forebay_control_client::{Facts, WorkerFact};
use forebay_proto::{Incarnation, Revision, WorkerId};
use serde::Serialize;

use super::ask::{Asked, desired, observed};
use crate::context::ContextArgs;
use crate::exit::CliError;
use crate::output::{OutputArgs, table};

/// Options of `forebay workers`.
#[derive(Debug, Args)]
pub(crate) struct WorkersArgs {
    #[command(flatten)]
    output: OutputArgs,
    #[command(flatten)]
    context: ContextArgs,
}

#[derive(Serialize)]
struct Workers {
    schema_version: u32,
    revision: Revision,
    workers: Vec<Row>,
}

#[derive(Serialize)]
struct Row {
    name: String,
    id: WorkerId,
    /// As logs print it, such as `w7.812.3`.
    incarnation: String,
    start: Incarnation,
    pool: String,
    desired: &'static str,
    observed: &'static str,
    in_force: bool,
    lost: bool,
    departed: bool,
    address: String,
    engine: String,
    models: Vec<String>,
    slots: u32,
    max_context_tokens: u32,
    kv_tokens: u64,
    zone: String,
    labels: std::collections::BTreeMap<String, String>,
    revision: Revision,
}

impl Row {
    fn of(worker: &WorkerFact) -> Self {
        let spec = &worker.spec;
        Self {
            name: worker.name.clone(),
            id: worker.id,
            incarnation: worker.incarnation.to_string(),
            start: worker.incarnation,
            pool: spec.pool.clone(),
            desired: desired(worker.desired),
            observed: observed(worker.observed),
            in_force: worker.is_in_force(),
            lost: worker.lost,
            departed: worker.departed,
            address: spec.advertise.clone(),
            engine: spec.engine.clone(),
            models: spec.models.clone(),
            slots: spec.slots,
            max_context_tokens: spec.max_context_tokens,
            kv_tokens: spec.kv_tokens,
            zone: spec.zone.clone(),
            labels: spec.labels.clone(),
            revision: worker.revision,
        }
    }
}

/// What a worker is, in one word: what keeps it from serving comes first.
pub(crate) fn state(worker: &WorkerFact) -> &'static str {
    match (worker.departed, worker.lost) {
        (true, _) => "departed",
        (false, true) => "lost",
        (false, false) => observed(worker.observed),
    }
}

/// Runs `forebay workers`.
pub(crate) fn run(args: &WorkersArgs) -> Result<(), CliError> {
    let context = args.context.resolve()?;
    crate::roles::thread()?.block_on(async {
        let asked = Asked::new(context)?;
        let facts = asked.read().await?;
        let workers = Workers {
            schema_version: 1,
            revision: facts.revision,
            workers: facts
                .workers
                .values()
                .map(|worker| Row::of(worker))
                .collect(),
        };
        args.output.print(&workers, || page(&facts));
        Ok(())
    })
}

fn page(facts: &Facts) -> String {
    let rows = facts.workers.values().map(|worker| {
        [
            worker.name.clone(),
            worker.incarnation.to_string(),
            worker.spec.pool.clone(),
            desired(worker.desired).to_owned(),
            state(worker).to_owned(),
            worker.spec.slots.to_string(),
            worker.spec.advertise.clone(),
            worker.spec.models.join(","),
        ]
    });
    table(
        [
            "NAME",
            "INCARNATION",
            "POOL",
            "DESIRED",
            "STATE",
            "SLOTS",
            "ADDRESS",
            "MODELS",
        ],
        rows,
    )
}
