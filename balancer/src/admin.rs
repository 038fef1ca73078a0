//! What the admin port shows of a balancer.
#![allow(clippy::disallowed_methods)] // the rim: readiness depends on the time since the facts came

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use forebay_admin::{Admin, Content, NotFound, Page, Search};
use forebay_scheduler::Load;
use forebay_scheduler::residency::Grade;
use serde_json::json;

use crate::core::receipts::{Wanted, shown};
use crate::shared::Shared;

/// Workers that could not be reached hold readiness up this long.
const FIRST_DIALS: Duration = Duration::from_secs(2);
/// Workers that were reached and have not told what is in their caches, up to this long.
const FIRST_SNAPSHOTS: Duration = Duration::from_secs(10);

pub(crate) fn admin(shared: &Arc<Shared>, name: &str) -> Admin {
    let page = |path, about, render: fn(&Shared) -> Content| {
        let shared = shared.clone();
        Page {
            path,
            about,
            render: Box::new(move || render(&shared)),
        }
    };
    let mut admin = Admin::new(format!("balancer {name}"), shared.metrics.registry());
    admin.pages = vec![
        page(
            "/debug/bookings",
            "bookings held on each worker, exactly 0 when idle",
            bookings,
        ),
        page(
            "/debug/requests",
            "requests being served, without their text",
            requests,
        ),
        page(
            "/debug/workers",
            "workers as this balancer sees them",
            workers,
        ),
    ];
    let searched = shared.clone();
    admin.searches.push(Search {
        path: "/debug/receipts",
        about: "receipts of the last decisions, newest last: ?request=ID, ?worker=NAME, &last=N (1,000)",
        find: Box::new(move |query| receipts(&searched, query)),
    });
    let shared = shared.clone();
    admin.ready = Box::new(move || ready(&shared));
    admin
}

/// Whether clients should be sent here, else every reason why not.
pub(crate) fn ready(shared: &Shared) -> Result<(), Vec<String>> {
    let mut reasons = Vec::new();
    if shared.draining.load(Ordering::Relaxed) {
        reasons.push("it is about to stop".to_owned());
    }
    match shared.facts() {
        None => reasons.push("no facts yet: is the control plane up?".to_owned()),
        Some(facts) => {
            let dispatch = shared.dispatch();
            let connected = dispatch.view().iter().any(|(_, link, _)| link.is_some());
            drop(dispatch);
            if !connected {
                reasons.push("no worker is connected".to_owned());
            }
            let tried = shared.tried.lock();
            let mut workers = facts.fleet.workers.iter();
            let pending = workers.any(|worker| !tried.contains(&worker.name));
            if pending && facts.since.elapsed() < FIRST_DIALS {
                reasons.push("not every worker has been tried yet".to_owned());
            }
            let unknown = shared.caches.pending();
            if unknown > 0 && facts.since.elapsed() < FIRST_SNAPSHOTS {
                reasons.push(format!("the caches of {unknown} workers are not known yet"));
            }
        }
    }
    if reasons.is_empty() {
        Ok(())
    } else {
        Err(reasons)
    }
}

fn requests(shared: &Shared) -> Content {
    Content::Json(json!({"count": shared.inflight(), "requests": shared.requests()}))
}

fn bookings(shared: &Shared) -> Content {
    let dispatch = shared.dispatch();
    let view = dispatch.view();
    let workers: Vec<_> = view
        .iter()
        .map(|(known, ..)| {
            let held = view.open_bookings(Some(known.incarnation.worker));
            json!({"worker": known.name, "bookings": held})
        })
        .collect();
    Content::Json(json!({
        "bookings": view.open_bookings(None),
        "queued": dispatch.waiting(),
        "inflight": shared.inflight(),
        "workers": workers,
    }))
}

fn workers(shared: &Shared) -> Content {
    let dispatch = shared.dispatch();
    let view = dispatch.view();
    let workers: Vec<_> = view
        .iter()
        .map(|(known, connected, load)| {
            json!({
                "name": known.name,
                "incarnation": known.incarnation.to_string(),
                "connected": connected.map(|incarnation| incarnation.to_string()),
                "acceptance": load.map(|load| format!("{:?}", load.acceptance)),
                "running": load.map(|load| load.running),
                "queued": load.map(|load| load.queued),
                "slots": load.map(|load| load.slots),
                "seq": load.map(|load| load.seq),
                "kv_used": load.and_then(|load| kv_used(known.spec.kv_tokens, load)),
                "tpot_ms": load.and_then(tpot_ms),
                "bookings": view.open_bookings(Some(known.incarnation.worker)),
                "residency": shared.caches.grade(known.incarnation.worker).map(Grade::name),
            })
        })
        .collect();
    let revision = shared.facts().map(|facts| facts.fleet.revision.0);
    Content::Json(json!({"revision": revision, "workers": workers}))
}

/// Share of the KV cache that requests use or are about to; none: nobody said how large it is.
#[allow(clippy::cast_precision_loss)] // for people
fn kv_used(kv_tokens: u64, load: &Load) -> Option<f64> {
    let used = load.backlog.context_tokens + load.backlog.pending_tokens;
    (kv_tokens > 0).then(|| used / kv_tokens as f64)
}

/// From token to token at present, by the worker's latency model; none: nothing decodes, or it has none.
fn tpot_ms(load: &Load) -> Option<f64> {
    let (model, backlog) = (load.model?, &load.backlog);
    let iteration = model.iteration_ms(0.0, backlog.decodes, backlog.context_tokens, 0.0);
    (iteration > 0.0).then_some(iteration)
}

fn receipts(shared: &Shared, query: &str) -> Result<Content, NotFound> {
    if shared.settings.receipts == 0 {
        let problem = "this balancer keeps no receipts: start it with --receipts above 0";
        return Err(NotFound::Nothing(problem.to_owned()));
    }
    let wanted = Wanted::parse(query).map_err(NotFound::Question)?;
    let names = shared.names();
    let of = match &wanted.worker {
        None => None,
        Some(name) => {
            let worker = names.iter().find(|(_, known)| *known == name);
            let unknown = || NotFound::Nothing(format!("there is no worker {name}"));
            Some(*worker.ok_or_else(unknown)?.0)
        }
    };
    let mut lines = String::new();
    for kept in shared.find(&wanted, of) {
        if let Some(receipt) = kept.packed.receipt() {
            lines += &shown(&kept, &receipt, &names).to_string();
            lines.push('\n');
        }
    }
    Ok(Content::Lines(lines))
}
