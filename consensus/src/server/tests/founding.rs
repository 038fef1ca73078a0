//! What a wrong or repeated `init` leaves behind.

use super::*;

fn is_bad_request(response: &Response) -> bool {
    matches!(response, Response::Failure(f) if matches!(f.failure, Some(Failure::BadRequest(_))))
}

#[test]
fn a_wrong_init_is_refused_and_leaves_the_disk_fit_for_a_right_one() {
    let mut cell = Cell::new(1);
    let right = cell.members();
    let other = |id: u64| wire::Member {
        id,
        name: format!("c{id}"),
        address: format!("127.0.0.1:{id}"),
        store_id: vec![id as u8; 16].into(),
        learner: false,
    };
    let many: Vec<_> = (2..=60).map(other).collect();
    for wrong in [
        vec![
            other(1),
            wire::Member {
                name: "c1".into(),
                ..other(1)
            },
        ],
        vec![right[0].clone(), other(1)],
        vec![
            right[0].clone(),
            wire::Member {
                name: "c1".into(),
                ..other(2)
            },
        ],
        vec![
            right[0].clone(),
            wire::Member {
                store_id: right[0].store_id.clone(),
                ..other(2)
            },
        ],
        vec![
            right[0].clone(),
            wire::Member {
                address: right[0].address.clone(),
                ..other(2)
            },
        ],
        [right.clone(), many].concat(),
        vec![],
    ] {
        let (cluster_id, members) = (vec![1; 16].into(), wrong);
        let refused = cell.ask(
            0,
            Request::Bootstrap(control::Bootstrap {
                cluster_id,
                members,
                feature_level: None,
            }),
        );
        assert!(is_bad_request(&refused), "{refused:?}");
        assert_eq!(cell.status(0).role, "uninitialised");
    }
    let founded = cell.bootstrap(1, &right);
    assert!(
        matches!(founded[0], Response::Bootstrapped(_)),
        "{founded:?}"
    );
    cell.leader();
}

#[test]
fn a_disk_that_fails_at_init_ends_the_node_with_the_reason() {
    let cell = Cell::new(0);
    let config = Config {
        data_dir: cell.disk(0),
        listen: "127.0.0.1:0".parse().unwrap(),
        credentials: cell.paths(Role::Control, "c1"),
        replica: ReplicaOptions::default(),
        audit_bytes: 1 << 20,
    };
    let disk = config.data_dir.clone();
    cell.runtime.block_on(async {
        let node = start_with(config, Settings::default()).await.unwrap();
        // A file where the log's folder should be.
        std::fs::write(disk.join("snapshots"), "in the way").unwrap();
        let status = node.status();
        let member = wire::Member {
            id: 1,
            name: "c1".into(),
            address: node.local_addr().unwrap().to_string(),
            store_id: status.store_id,
            learner: false,
        };
        let request = control::Bootstrap {
            cluster_id: vec![1; 16].into(),
            members: vec![member],
            feature_level: None,
        };
        let failed = super::super::bootstrap::bootstrap(&node.shared, &request).await;
        assert!(matches!(failed, Err(Failure::Stopped(_))), "{failed:?}");
        let watcher = node.clone();
        let ended = tokio::time::timeout(PATIENCE, node.run(std::future::pending())).await;
        let reason = ended.expect("it ends").unwrap_err().to_string();
        assert!(reason.contains("snapshots"), "{reason}");
        assert_eq!(watcher.status().role, "stopped");
    });
}

#[test]
fn a_disk_that_fails_at_work_ends_the_node_with_the_reason() {
    let cell = Cell::new(0);
    let config = Config {
        data_dir: cell.disk(0),
        listen: "127.0.0.1:0".parse().unwrap(),
        credentials: cell.paths(Role::Control, "c1"),
        replica: ReplicaOptions {
            snapshot_entries: 5,
            ..ReplicaOptions::default()
        },
        audit_bytes: 1 << 20,
    };
    let snapshots = config.data_dir.join("snapshots");
    cell.runtime.block_on(async {
        let node = start_with(config, Settings::default()).await.unwrap();
        let member = wire::Member {
            id: 1,
            name: "c1".into(),
            address: node.local_addr().unwrap().to_string(),
            store_id: node.status().store_id,
            learner: false,
        };
        let request = control::Bootstrap {
            cluster_id: vec![1; 16].into(),
            members: vec![member],
            feature_level: None,
        };
        let founded = super::super::bootstrap::bootstrap(&node.shared, &request).await;
        assert!(founded.is_ok(), "{founded:?}");
        let leader = node.leader().await.unwrap();
        std::fs::remove_dir_all(&snapshots).unwrap();
        std::fs::write(&snapshots, "in the way").unwrap();
        let proposer = leader.clone();
        tokio::spawn(async move {
            let nobody = wire::RemoveWorker::default();
            while !proposer.leads(tokio::time::Instant::now()).await {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
            while proposer
                .propose(Action::Remove(nobody.clone()), "")
                .await
                .is_ok()
            {}
        });
        let ended = tokio::time::timeout(PATIENCE, node.run(std::future::pending())).await;
        let reason = ended.expect("it ends").unwrap_err().to_string();
        assert!(reason.contains("snapshots"), "{reason}");
        let resigned = async {
            while leader.is_leader() {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        let resigned = tokio::time::timeout(PATIENCE, resigned).await;
        assert!(resigned.is_ok(), "it does not go on as a leader");
    });
}
