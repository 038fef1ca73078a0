//! A balancer on loopback with scripted agents over real links, and a client that sees every byte.
#![allow(clippy::unwrap_used, clippy::panic, dead_code, unreachable_pub)] // a test's helpers fail as its assertions do
#![allow(clippy::disallowed_methods)] // tests of the shell run in real time
#![allow(missing_docs, unused_imports)] // each test file uses its part

mod agent;
mod client;

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use forebay_balancer::{Bound, Fleet, Settings, serve};
use forebay_link::{Authority, CredentialPaths, Credentials, Endpoint};
use forebay_proto::config::{Config, Pool};
use forebay_proto::{FingerprintKey, Revision, Role};
use tokio::sync::{oneshot, watch};

pub use agent::{Act, Agent, EVENT, REST, Saw, Script, WHOLE, agent};
pub use client::{Answer, Client};

pub const PATIENCE: Duration = Duration::from_secs(10);

/// Measures until it is within the bound once, three times at most: a machine that is busy with something
/// else for a moment says nothing of the balancer.
pub async fn promptly(bound: Duration, mut measure: impl AsyncFnMut() -> Duration) {
    let mut took = Vec::new();
    while took.len() < 3 {
        let once = measure().await;
        if once < bound {
            return;
        }
        took.push(once);
    }
    panic!("{took:?}, each more than {bound:?}");
}

pub struct World {
    pub dir: tempfile::TempDir,
    authority: Authority,
    pub agents: Vec<Agent>,
    next: Script,
    pub fleet: watch::Sender<Option<Arc<Fleet>>>,
    pub bound: Bound,
    pub stop: Option<oneshot::Sender<()>>,
    pub task: Option<tokio::task::JoinHandle<()>>,
}

/// How a world differs from the usual one.
pub struct Setup {
    pub agents: usize,
    pub slots: u32,
    pub pool: Pool,
    pub settings: Settings,
    /// The fingerprint key, if the leader drew one.
    pub key: Option<FingerprintKey>,
    /// What each agent serves beside its model.
    pub adapters: Vec<String>,
    /// Where they are, in turn; none: nobody said.
    pub zones: Vec<String>,
}

impl Default for Setup {
    fn default() -> Self {
        let mut settings = Settings::on(loopback());
        settings.admin = Some(loopback());
        settings.any_key_tenant = Some("dev".into());
        Self {
            agents: 1,
            slots: 4,
            pool: Pool::named("default"),
            settings,
            key: None,
            adapters: Vec::new(),
            zones: Vec::new(),
        }
    }
}

pub fn loopback() -> SocketAddr {
    ([127, 0, 0, 1], 0).into()
}

pub fn credentials(dir: &Path, authority: &Authority, role: Role, name: &str) -> CredentialPaths {
    if !dir.join("ca.pem").exists() {
        authority.save(dir).unwrap();
    }
    let (cert, key) = authority.issue(role, name, 30).unwrap().save(dir).unwrap();
    CredentialPaths {
        ca: dir.join("ca.pem"),
        cert,
        key,
    }
}

impl World {
    pub async fn new(setup: Setup) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let authority = Authority::create("test", 1).unwrap();
        let load = |role, name: &str| {
            Credentials::load(&credentials(dir.path(), &authority, role, name)).unwrap()
        };
        let next = Script::default();
        let agents: Vec<_> = (1..=setup.agents)
            .map(|id| {
                let name = format!("w{id}");
                let mut agent = agent(&load(Role::Agent, &name), &name, id, setup.slots, &next);
                agent.known.spec.adapters = setup.adapters.clone();
                if let Some(zone) = setup.zones.get(id - 1) {
                    agent.known.spec.zone.clone_from(zone);
                }
                agent
            })
            .collect();
        let fleet = Fleet {
            revision: Revision(1),
            workers: agents.iter().map(|agent| agent.known.clone()).collect(),
            config: Config {
                pools: vec![setup.pool],
            },
            keys: setup.key.into_iter().collect(),
            families: Vec::new(),
            suspects: Vec::new(),
            cell_time: forebay_proto::Millis(0),
        };
        let (fleet, facts) = watch::channel(Some(Arc::new(fleet)));
        let endpoint = Endpoint::client(&load(Role::Balancer, "b1")).unwrap();
        let (stop, stopped) = oneshot::channel::<()>();
        let (tell, bound) = oneshot::channel();
        let task = tokio::spawn(async move {
            let bound = |bound| tell.send(bound).unwrap();
            let shutdown = async {
                let _ = stopped.await;
            };
            serve(setup.settings, endpoint, facts, bound, shutdown)
                .await
                .unwrap();
        });
        let world = Self {
            bound: bound.await.unwrap(),
            dir,
            authority,
            agents,
            next,
            fleet,
            stop: Some(stop),
            task: Some(task),
        };
        if setup.agents > 0 {
            world.until("/readyz", |status, _| status == 200).await;
            // Each agent's first report is in.
            let all = setup.agents;
            world
                .until("/debug/workers", |_, text| {
                    text.matches("\"acceptance\":\"Open\"").count() == all
                })
                .await;
        }
        world
    }

    /// Why a balancer does not start.
    pub async fn refused(setup: Setup) -> String {
        let dir = tempfile::tempdir().unwrap();
        let authority = Authority::create("test", 1).unwrap();
        let paths = credentials(dir.path(), &authority, Role::Balancer, "b1");
        let endpoint = Endpoint::client(&Credentials::load(&paths).unwrap()).unwrap();
        let (_fleet, facts) = watch::channel(None);
        let never = std::future::pending();
        let served = serve(
            setup.settings,
            endpoint,
            facts,
            |_| panic!("it starts"),
            never,
        );
        served.await.unwrap_err().to_string()
    }

    pub async fn with(agents: usize) -> Self {
        Self::new(Setup {
            agents,
            ..Setup::default()
        })
        .await
    }

    /// Whichever agent is asked next does the next of these.
    pub fn next(&self, acts: &[Act]) {
        self.next.lock().extend(acts.iter().cloned());
    }

    /// Asks an admin page until it says so.
    pub async fn until(&self, path: &str, holds: impl Fn(u16, &str) -> bool) {
        let began = Instant::now();
        loop {
            let (status, text) = self.page(path).await;
            if holds(status, &text) {
                return;
            }
            assert!(began.elapsed() < PATIENCE, "{path}: {status} {text}");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    pub async fn page(&self, path: &str) -> (u16, String) {
        let mut client = Client::to(self.bound.admin.unwrap()).await;
        client
            .send(&format!("GET {path} HTTP/1.1\r\nhost: x\r\n\r\n"))
            .await;
        let head = client.head().await;
        (head.status, client.body(&head).await.unwrap())
    }

    /// Nothing is booked, in flight or queued any more.
    pub async fn settles(&self) {
        let zero = |text: &str| {
            ["\"bookings\":0,\"inflight\":0,\"queued\":0"]
                .iter()
                .all(|part| text.contains(part))
                || (text.contains("\"inflight\":0")
                    && text.contains("\"queued\":0")
                    && !text.contains("\"bookings\":1")
                    && text.matches("\"bookings\":0").count() == self.agents.len() + 1)
        };
        self.until("/debug/bookings", |_, text| zero(text)).await;
        let (_, metrics) = self.page("/metrics").await;
        for gauge in ["inflight 0", "bookings 0", "queued 0", "body_bytes 0"] {
            assert!(
                metrics.contains(&format!("forebay_balancer_{gauge}\n")),
                "{gauge}: {metrics}"
            );
        }
    }

    pub async fn client(&self) -> Client {
        Client::to(self.bound.listen).await
    }

    /// Asks for a chat on a connection of its own; gives status, head and whole body.
    pub async fn chat(&self, streaming: bool) -> Answer {
        let mut client = self.client().await;
        client.chat(streaming).await;
        client.answer().await
    }
}
