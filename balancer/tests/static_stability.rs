//! Without a control plane a balancer serves by the facts on its disk, also after a restart.
#![allow(clippy::unwrap_used, clippy::panic)] // a test's helpers fail as its assertions do
#![allow(clippy::disallowed_methods)] // tests of the shell run in real time

mod common;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use common::{Client, Script, WHOLE, agent, credentials, loopback};
use forebay_balancer::{Config, run};
use forebay_control_client::{Facts, FactsFile, WorkerFact};
use forebay_link::{Authority, Credentials};
use forebay_proto::wire::fleet::Observed;
use forebay_proto::{ClusterId, Millis, Revision, Role};

#[tokio::test]
async fn facts_on_disk_are_enough_to_serve_and_to_serve_again() {
    let dir = tempfile::tempdir().unwrap();
    let authority = Authority::create("test", 1).unwrap();
    let paths = credentials(dir.path(), &authority, Role::Agent, "w1");
    let worker = Credentials::load(&paths).unwrap();
    let worker = agent(&worker, "w1", 1, 4, &Script::default());
    let known = worker.known.clone();
    let fact = WorkerFact {
        id: known.incarnation.worker,
        name: known.name.clone(),
        incarnation: known.incarnation,
        spec_bytes: known.spec.to_wire(),
        spec: known.spec,
        desired: known.desired,
        observed: Observed::Ready,
        lost: false,
        departed: false,
        desired_revision: Revision(1),
        acknowledged_revision: Revision(1),
        revision: Revision(1),
        end_streams: false,
    };
    let config = forebay_proto::config::Config::default();
    let facts = Facts {
        cluster_id: ClusterId([1; 16]),
        revision: Revision(7),
        cell_time: Millis(1),
        workers: BTreeMap::from([(known.name, Arc::new(fact))]),
        members: Vec::new(),
        feature_level: 0,
        config_bytes: config.to_wire(),
        config: Arc::new(config),
        config_revision: Revision(0),
        correlated_expiry: BTreeSet::new(),
        key_epoch: 0,
        keys: Vec::new(),
        drains: Default::default(),
        families: Default::default(),
        rebalances: Default::default(),
        suspects: Default::default(),
    };
    let data_dir = dir.path().join("data");
    std::fs::create_dir(&data_dir).unwrap();
    FactsFile::new(&data_dir).save(&facts).unwrap();

    let free = std::net::TcpListener::bind(loopback()).unwrap();
    let listen = free.local_addr().unwrap();
    drop(free);
    let config = Config {
        listen,
        admin: None,
        control: vec!["127.0.0.1:1".into()],
        data_dir,
        credentials: credentials(dir.path(), &authority, Role::Balancer, "b1"),
        keys: None,
        any_key_tenant: Some("dev".into()),
        tls: None,
        max_body_bytes: 32 << 20,
        hold_headers_ms: 15_000,
        drain_timeout_ms: 1_000,
        receipts: 0,
    };
    for _ in 0..2 {
        let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
        let running = tokio::spawn(run(config.clone(), async {
            let _ = stopped.await;
        }));
        while tokio::net::TcpStream::connect(listen).await.is_err() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        // The link may not stand yet: the request waits for it.
        let mut client = Client::to(listen).await;
        client.chat(false).await;
        assert_eq!(client.answer().await.body, WHOLE);
        drop(client);
        stop.send(()).unwrap();
        running.await.unwrap().unwrap();
    }
}
