//! The control plane's facts as a balancer's own: the one place where the two meet.
#![allow(clippy::disallowed_methods)] // the rim: ids are drawn and tasks begin here

use std::path::Path;
use std::sync::Arc;

use forebay_control_client::{ControlClient, Facts, RenewState, Renewing};
use forebay_link::Endpoint;
use forebay_proto::wire::fleet::Observed;
use forebay_proto::{ClientId, Revision};
use forebay_scheduler::Known;
use rand::Rng;
use tokio::sync::watch;

use crate::fleet::Fleet;
use crate::links::Task;

/// Facts are followed, and the lease is kept, until this is dropped.
pub(crate) struct Following {
    fleet: watch::Receiver<Option<Arc<Fleet>>>,
    _renewing: Renewing,
    _task: Task,
}

impl Following {
    pub(crate) fn facts(&self) -> watch::Receiver<Option<Arc<Fleet>>> {
        self.fleet.clone()
    }
}

/// Follows the facts, beginning with those in `directory`.
pub(crate) fn follow(endpoint: &Endpoint, control: &[String], directory: &Path) -> Following {
    let mut rng = rand::rng();
    let client_id = ClientId(rng.random());
    let client = ControlClient::new(endpoint.clone(), control.to_vec(), client_id, rng.random());
    let watching = client.spawn_watch(Some(directory));
    let held = watching.facts.borrow().as_deref().map(fleet);
    let (publish, receiver) = watch::channel(held.map(Arc::new));
    let (applied, state) = watch::channel(RenewState {
        incarnation: None,
        applied_revision: Revision(0),
        observed: Observed::Unspecified,
        work: None,
        heat: None,
    });
    let renewing = client.spawn_renew(state);
    let task = Task::spawn(async move {
        // Whole: what follows the facts must live as long as they are followed.
        let mut watching = watching;
        loop {
            let newest = watching.facts.borrow_and_update().clone();
            if let Some(facts) = newest {
                publish.send_replace(Some(Arc::new(fleet(&facts))));
                applied.send_modify(|state| state.applied_revision = facts.revision);
            }
            if watching.facts.changed().await.is_err() {
                return;
            }
        }
    });
    Following {
        fleet: receiver,
        _renewing: renewing,
        _task: task,
    }
}

fn fleet(facts: &Facts) -> Fleet {
    let workers = facts.workers.values().map(|worker| Known {
        name: worker.name.clone(),
        incarnation: worker.incarnation,
        spec: worker.spec.clone(),
        desired: worker.desired,
        departed: worker.departed,
    });
    Fleet {
        revision: facts.revision,
        workers: workers.collect(),
        config: (*facts.config).clone(),
        keys: facts.keys.clone(),
        families: facts.families.values().cloned().collect(),
        suspects: facts.suspects.values().cloned().collect(),
        cell_time: facts.cell_time,
    }
}
