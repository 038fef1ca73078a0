//! The whole agent: data directory, engine, registration, work side, stop.

use std::future::Future;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use forebay_admin::Admin;
use forebay_admin::prometheus_client::registry::Registry;
use forebay_control_client::{ClientError, ControlClient, Facts, RenewState, RenewStatus};
use forebay_link::{Alpn, BindError, Endpoint};
use forebay_proto::wire::fleet::command::Action;
use forebay_proto::wire::fleet::{Desired, Goodbye, Observed};
use forebay_proto::{ClientId, ClusterId, Incarnation, Revision};
use parking_lot::Mutex;
use tokio::sync::watch;

use super::config::{Checked, Config};
use super::disk::DataDir;
use super::engine::Engine;
use super::found::EngineFacts;
use super::heat;
use super::lifecycle::Lifecycle;
use super::map::MapFile;
use super::metrics::Metrics;
use super::peers::Peers;
use super::post_mortem;
use super::probe::first_found;
use super::register::{Registered, Registrar};
use super::work::{Setup, Status, Work};
use crate::core::{Standing, standing};
use crate::error::AgentError;
use crate::wire;

/// Between two looks at what is under way: a renewal tells the newest one.
const LOOK_AT_WORK: Duration = Duration::from_millis(500);

const GOODBYE_PATIENCE: Duration = Duration::from_secs(2);

/// Runs an agent until `shutdown` ends or it must stop.
///
/// A worker that was registered before serves at once, with or without the control plane; a new one
/// is registered first. On `shutdown` it takes nothing new, finishes what runs within the drain
/// timeout, says goodbye and returns.
///
/// # Errors
///
/// Returns why it cannot start, or why it had to stop; the message says what to do.
pub async fn run(
    config: Config,
    shutdown: impl Future<Output = ()> + Send,
) -> Result<(), AgentError> {
    let checked = config.check()?;
    let mut shutdown = pin!(shutdown);
    let process = checked.process.clone().map(Lifecycle::new);
    let ran = async {
        let agent = tokio::select! {
            agent = Agent::start(config, &checked, process.clone()) => agent?,
            () = &mut shutdown => return Ok(()),
        };
        agent.serve(shutdown, &checked).await
    };
    let ended = ran.await;
    if let Some(process) = process {
        process.stop().await;
    }
    ended
}

struct Agent {
    config: Config,
    dir: DataDir,
    endpoint: Endpoint,
    client: ControlClient,
    watching: forebay_control_client::Watching,
    work: Work,
    advertise: String,
    /// The newest start that is counted on disk.
    own: Incarnation,
    /// When that was registered.
    registered: watch::Sender<Option<Revision>>,
    cluster: Option<ClusterId>,
    /// What the newest registration says of the engine.
    declared: Option<Declared>,
}

impl Agent {
    async fn start(
        config: Config,
        checked: &Checked,
        process: Option<Arc<Lifecycle>>,
    ) -> Result<Self, AgentError> {
        let mut dir = DataDir::open(&config.data_dir, &checked.name)?;
        if let Some(process) = &process {
            process.begin(dir.path());
        }
        let held = dir.count_start()?;
        let endpoint = Endpoint::bind(config.listen, &checked.credentials, &[Alpn::Work])?;
        if let Some(held) = &held {
            // A balancer that is quick to return learns whom it speaks to.
            let incarnation = held.incarnation().to_wire();
            endpoint.update_hello(|hello| hello.incarnation = Some(incarnation));
        }
        let bound = endpoint.local_addr().map_err(|error| BindError::Io {
            address: config.listen,
            error,
        })?;
        let advertise = config.advertised(bound)?;
        let metrics = Metrics::new(checked.settings.slots);
        let shown = Shown::default();
        let admin = match config.admin {
            Some(address) => Some(shown.serve(address, &checked.name, &metrics).await?),
            None => None,
        };
        let outward = Endpoint::client(&checked.credentials)?;
        let client_id = ClientId(rand::random());
        let client = ControlClient::new(outward, config.control.clone(), client_id, rand::random());
        let watching = client.spawn_watch(Some(dir.path()));
        let on_disk = watching
            .facts
            .borrow()
            .as_ref()
            .map(|facts| facts.cluster_id);
        let mut cluster = dir.record().map(|record| record.cluster_id).or(on_disk);
        let mut declared = None;
        let (incarnation, registered) = match held {
            Some(record) => (record.incarnation(), None),
            None => {
                let engine = Engine::new(checked.engine.clone(), 1, process.clone());
                let found = first_found(&engine, checked.manner.kind.as_deref()).await;
                let spec = config.spec(&advertise, &found.models, &found.engine)?;
                let registrar = Registrar {
                    client: &client,
                    name: &checked.name,
                    takeover: config.takeover,
                    cluster,
                };
                let Registered {
                    cluster_id,
                    incarnation,
                    revision,
                } = registrar.register(&dir, None, &spec).await?;
                dir.granted(cluster_id, incarnation)?;
                cluster = Some(cluster_id);
                declared = Some(Declared {
                    models: found.models.into(),
                    engine: Arc::new(found.engine),
                });
                (incarnation, Some(revision))
            }
        };
        if let Some(cluster) = cluster {
            endpoint.update_hello(|hello| hello.cluster_id = cluster.to_wire());
        }
        let setup = Setup {
            incarnation,
            settings: checked.settings,
            zone: config.zone.clone(),
            engine: checked.engine.clone(),
            patience: checked.patience,
            manner: checked.manner.clone(),
            map: Some(MapFile::in_directory(dir.path())),
            kv_events: checked.kv_events.clone(),
        };
        let work = Work::start_with(&endpoint, setup, metrics, process);
        shown.show(work.status());
        tracing::info!(
            name = checked.name,
            %incarnation,
            listen = %bound,
            advertise,
            admin = admin.map(|address| address.to_string()),
            "ready"
        );
        Ok(Self {
            config,
            dir,
            endpoint,
            client,
            watching,
            work,
            advertise,
            own: incarnation,
            registered: watch::Sender::new(registered),
            cluster,
            declared,
        })
    }

    async fn serve(
        self,
        shutdown: impl Future<Output = ()>,
        checked: &Checked,
    ) -> Result<(), AgentError> {
        let Self {
            config,
            mut dir,
            endpoint,
            client,
            mut watching,
            work,
            advertise,
            own,
            registered,
            cluster,
            declared,
        } = self;
        let name = checked.name.as_str();
        let mut lease = Lease {
            config: &config,
            name,
            dir: &mut dir,
            client: &client,
            work: &work,
            advertise: &advertise,
            own,
            registered: &registered,
            cluster,
        };
        let facts = follow(&mut watching.facts, &work, name, own, &registered);
        let background = async {
            tokio::select! {
                error = facts => error,
                error = lease.keep(declared) => error,
            }
        };
        let mut background = pin!(background);
        let stopped = tokio::select! {
            error = &mut background => Err(error),
            () = shutdown => {
                tracing::info!("stopping: taking nothing new, finishing what runs");
                work.stop();
                tokio::select! {
                    error = &mut background => Err(error),
                    () = work.idle() => Ok(()),
                    () = tokio::time::sleep(checked.drain_timeout) => {
                        let left = work.status().borrow().in_flight;
                        tracing::warn!(left, "the drain timeout passed, these are cut off");
                        Ok(())
                    }
                }
            }
        };
        if stopped.is_ok() && registered.borrow().is_some() {
            say_goodbye(&client, own).await;
        }
        work.keep_map().await;
        work.told().await;
        endpoint.close("the agent stops");
        endpoint.wait_idle().await;
        stopped
    }
}

async fn say_goodbye(client: &ControlClient, incarnation: Incarnation) {
    let goodbye = Action::Goodbye(Goodbye {
        incarnation: Some(incarnation.to_wire()),
    });
    if let Err(error) = client
        .propose(goodbye, "agent stop", GOODBYE_PATIENCE)
        .await
    {
        tracing::warn!(%error, "the control plane was not told of the stop, the lease runs out");
    }
}

/// Applies the facts as they come; returns why the process must stop.
async fn follow(
    facts: &mut watch::Receiver<Option<Arc<Facts>>>,
    work: &Work,
    name: &str,
    own: Incarnation,
    registered: &watch::Sender<Option<Revision>>,
) -> AgentError {
    let mut registration = registered.subscribe();
    let mut peers = Peers::default();
    loop {
        let newest = facts.borrow_and_update().clone();
        let at = *registration.borrow_and_update();
        if let Some(newest) = newest {
            peers.look(&newest, name);
            match standing(&newest, name, own, at) {
                Standing::NotYet => {}
                Standing::Wanted(desired) => {
                    work.apply(desired, newest.revision);
                    let worker = newest.workers.get(name);
                    if desired == Desired::Draining && worker.is_some_and(|w| w.end_streams) {
                        work.end_streams();
                    }
                }
                Standing::Superseded(current) => {
                    return AgentError::Superseded {
                        name: name.into(),
                        own,
                        current: Some(current),
                    };
                }
                Standing::Removed => return AgentError::Removed { name: name.into() },
            }
        }
        // Both senders live as long as this.
        tokio::select! {
            _ = facts.changed() => {}
            _ = registration.changed() => {}
        }
    }
}

/// What a registration says of the engine.
#[derive(Clone, Debug, PartialEq)]
struct Declared {
    models: Arc<[String]>,
    engine: Arc<EngineFacts>,
}

/// Keeps the worker registered as what it is, and its lease.
struct Lease<'a> {
    config: &'a Config,
    name: &'a str,
    dir: &'a mut DataDir,
    client: &'a ControlClient,
    work: &'a Work,
    advertise: &'a str,
    own: Incarnation,
    registered: &'a watch::Sender<Option<Revision>>,
    cluster: Option<ClusterId>,
}

impl Lease<'_> {
    /// Returns why the process must stop. `declared`: what it is registered with already.
    async fn keep(&mut self, declared: Option<Declared>) -> AgentError {
        match self.keep_on(declared).await {
            Ok(never) => match never {},
            Err(error) => error,
        }
    }

    async fn keep_on(
        &mut self,
        declared: Option<Declared>,
    ) -> Result<std::convert::Infallible, AgentError> {
        let mut declared = match declared {
            Some(declared) => declared,
            None => {
                let found = other_engine(self.work, None).await;
                self.register(&found).await?;
                found
            }
        };
        loop {
            declared = self.renew_until_other(&declared).await?;
            self.register(&declared).await?;
        }
    }

    async fn register(&self, declared: &Declared) -> Result<(), AgentError> {
        let Declared { models, engine } = declared;
        let spec = self.config.spec(self.advertise, models, engine)?;
        let registrar = Registrar {
            client: self.client,
            name: self.name,
            takeover: self.config.takeover,
            cluster: self.cluster,
        };
        let done = registrar
            .register(self.dir, self.dir.record(), &spec)
            .await?;
        tracing::info!(incarnation = %done.incarnation, revision = %done.revision, "registered");
        self.registered.send_replace(Some(done.revision));
        Ok(())
    }

    /// Renews the lease; returns when the engine says something else of itself.
    async fn renew_until_other(&self, declared: &Declared) -> Result<Declared, AgentError> {
        let mut status = self.work.status();
        // A copy: what is under way is looked at with the status free to change.
        let first = status.borrow_and_update().clone();
        let first = renew_state(self.work, &first);
        let said = watch::Sender::new(first);
        let mut renewing = self.client.spawn_renew(said.subscribe());
        let recording = renewing.status.clone();
        let superseded = async {
            let over = |status: &RenewStatus| {
                matches!(status.problem, Some(ClientError::Superseded { .. }))
            };
            match renewing
                .status
                .wait_for(over)
                .await
                .map(|status| status.problem.clone())
            {
                Ok(Some(ClientError::Superseded { current })) => current,
                Ok(_) | Err(_) => None,
            }
        };
        let tell = async {
            let mut looks = tokio::time::interval(LOOK_AT_WORK);
            loop {
                let looked = tokio::select! {
                    changed = status.changed() => match changed {
                        Ok(()) => false,
                        Err(_) => return,
                    },
                    _ = looks.tick() => true,
                };
                let Status {
                    observed,
                    applied_revision,
                    ..
                } = *status.borrow_and_update();
                let urgent = said.borrow().observed != observed;
                let work = (looked || urgent).then(|| work_of(self.work, observed));
                said.send_if_modified(|shown| {
                    // A revision alone is told with the next renewal, and so is what is under way.
                    shown.observed = observed;
                    shown.applied_revision = applied_revision;
                    shown.work = work.or_else(|| shown.work.take());
                    urgent
                });
            }
        };
        let answer = heat::answer(self.work, self.client, recording);
        let heat = heat::tell(self.work, &self.config.pool, &said);
        let deaths = post_mortem::tell(self.work, self.client, self.own);
        tokio::select! {
            found = other_engine(self.work, Some(declared)) => Ok(found),
            current = superseded => Err(AgentError::Superseded {
                name: self.name.into(),
                own: self.own,
                current,
            }),
            () = tell => std::future::pending().await,
            () = heat => std::future::pending().await,
            () = answer => std::future::pending().await,
            () = deaths => std::future::pending().await,
        }
    }
}

fn renew_state(work: &Work, status: &Status) -> RenewState {
    RenewState {
        incarnation: Some(status.incarnation),
        applied_revision: status.applied_revision,
        observed: status.observed,
        work: Some(work_of(work, status.observed)),
        heat: None,
    }
}

fn work_of(work: &Work, observed: Observed) -> forebay_proto::wire::control::Work {
    let draining = observed == Observed::Draining;
    wire::work_under_way(work.under_way(), draining)
}

/// What the engine says of itself, once it does and it is not this.
async fn other_engine(work: &Work, than: Option<&Declared>) -> Declared {
    let mut status = work.status();
    let found =
        status.wait_for(|status| declared(status).is_some_and(|found| Some(&found) != than));
    match found.await.map(|status| declared(&status)) {
        Ok(Some(found)) => found,
        // The sender lives as long as the work side.
        Ok(None) | Err(_) => std::future::pending().await,
    }
}

fn declared(status: &Status) -> Option<Declared> {
    let engine = status
        .engine
        .clone()
        .filter(|_| !status.models.is_empty())?;
    Some(Declared {
        models: status.models.clone(),
        engine,
    })
}

/// What the admin pages show; there is no work side before the first registration.
#[derive(Clone, Default)]
struct Shown(Arc<Mutex<Option<watch::Receiver<Status>>>>);

impl Shown {
    fn show(&self, status: watch::Receiver<Status>) {
        *self.0.lock() = Some(status);
    }

    async fn serve(
        &self,
        address: std::net::SocketAddr,
        name: &str,
        metrics: &Metrics,
    ) -> Result<std::net::SocketAddr, AgentError> {
        let mut registry = Registry::default();
        metrics.register(&mut registry);
        let mut admin = Admin::new(format!("agent {name}"), registry);
        let shown = self.clone();
        admin.ready = Box::new(move || shown.ready());
        Ok(forebay_admin::serve(address, admin).await?)
    }

    fn ready(&self) -> Result<(), Vec<String>> {
        let shown = self.0.lock();
        let observed = shown.as_ref().map(|status| status.borrow().observed);
        let reason = match observed {
            Some(Observed::Ready) => return Ok(()),
            None => "waits for the engine and for its first registration",
            Some(Observed::Joining | Observed::Unspecified) => {
                "waits for the engine or for the facts"
            }
            Some(Observed::Cordoned) => "is cordoned",
            Some(Observed::Draining) => "drains",
            Some(Observed::Drained) => "is drained",
            Some(Observed::EngineDown) => "its engine does not answer",
        };
        Err(vec![format!("the worker {reason}")])
    }
}
