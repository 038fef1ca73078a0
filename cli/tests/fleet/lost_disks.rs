//! Disks that vanish, and disks that belong to others.

use std::time::Duration;

use crate::harness::{FAST_ENGINE, Fleet, forebay, within};

/// What a node says is wrong with it, as `forebay members` shows it.
fn problem(fleet: &Fleet, name: &str) -> String {
    within(Duration::from_secs(10), "a problem is shown", || {
        let members = fleet.json(&["members"]);
        let member = members["members"]
            .as_array()?
            .iter()
            .find(|one| one["name"] == name)?
            .clone();
        let problem = member["error"].as_str()?.to_owned();
        problem.contains("lost its disk").then_some(problem)
    })
}

#[test]
fn wiped_disks_never_begin_a_second_history() {
    let fleet = Fleet::start(&[&["--control", "3"], &FAST_ENGINE[..]].concat());
    let leader = fleet.wait_for_control(3);
    let others: Vec<String> = ["c1", "c2", "c3"]
        .into_iter()
        .filter(|name| *name != leader)
        .map(str::to_owned)
        .collect();
    let cluster = fleet.json(&["status"])["cluster_id"].clone();

    let wipe = |name: &str| {
        fleet.kill(name);
        let disk = fleet.data().join(name);
        let kept = disk.with_extension("lost");
        std::fs::rename(&disk, &kept).unwrap();
        fleet.start_again(&[name]);
    };
    wipe(&others[0]);
    let said = problem(&fleet, &others[0]);
    assert!(
        said.contains("docs/operators.md"),
        "names the way out: {said}"
    );
    assert_eq!(
        fleet.run(&["status"]).status.code(),
        Some(0),
        "two of three go on"
    );

    wipe(&others[1]);
    problem(&fleet, &others[1]);
    let status = fleet.run(&["status"]);
    assert_eq!(status.status.code(), Some(7));
    let addresses = |names: &[&String]| {
        let each = names
            .iter()
            .map(|name| fleet.process(name).addresses["quic"].clone());
        each.collect::<Vec<_>>().join(",")
    };
    // Neither all three nor an empty one alone can be made a new cluster.
    for names in [
        vec![&leader, &others[0], &others[1]],
        vec![&others[0]],
        vec![&others[1]],
    ] {
        let refused = fleet.run(&["init", "--control", &addresses(&names)]);
        let stderr = String::from_utf8_lossy(&refused.stderr).into_owned();
        assert_ne!(refused.status.code(), Some(0), "{names:?}");
        assert!(
            stderr.contains("docs/operators.md") || stderr.contains("already"),
            "{stderr}"
        );
    }

    // The way out of the book: the old disks back.
    for name in &others {
        fleet.kill(name);
        let disk = fleet.data().join(name);
        std::fs::remove_dir_all(&disk).unwrap();
        std::fs::rename(disk.with_extension("lost"), &disk).unwrap();
        fleet.start_again(&[name]);
    }
    fleet.wait_for_control(3);
    assert_eq!(fleet.json(&["status"])["cluster_id"], cluster);
}

#[test]
fn what_belongs_to_another_cluster_or_node_is_refused_with_a_reason() {
    let fleet = Fleet::start(&[&["--control", "1"], &FAST_ENGINE[..]].concat());
    let other = tempfile::tempdir().unwrap();
    let ca = other.path().join("ca");
    let run = |args: &[&str]| forebay().args(args).output().unwrap();
    let dir = ca.to_str().unwrap();
    assert!(
        run(&["ca", "init", "--cell", "other", "--dir", dir])
            .status
            .success()
    );
    let issue = |role: &str, name: &str| {
        let issued = run(&[
            "ca", "issue", "--role", role, "--name", name, "--dir", dir, "--out", dir,
        ]);
        assert!(
            issued.status.success(),
            "{}",
            String::from_utf8_lossy(&issued.stderr)
        );
        (
            ca.join(format!("{name}.pem")),
            ca.join(format!("{name}-key.pem")),
        )
    };
    let refused = |what: &str, args: Vec<String>, says: &str| {
        let output = forebay().args(&args).output().unwrap();
        let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success(), "{what}: {args:?}");
        assert!(stderr.contains(says), "{what}: {stderr}");
    };
    let flags = |(cert, key): &(std::path::PathBuf, std::path::PathBuf)| {
        vec![
            "--ca".to_owned(),
            ca.join("ca.pem").display().to_string(),
            "--cert".to_owned(),
            cert.display().to_string(),
            "--key".to_owned(),
            key.display().to_string(),
        ]
    };
    let control = |extra: &[&str]| -> Vec<String> {
        let fixed = [
            "control",
            "--listen",
            "127.0.0.1:0",
            "--admin",
            "127.0.0.1:0",
        ];
        fixed
            .iter()
            .chain(extra)
            .map(|&arg| arg.to_owned())
            .collect()
    };

    // A certificate of the wrong role.
    let agent = issue("agent", "w1");
    let disk = other.path().join("disk");
    let args = [
        control(&["--data-dir", disk.to_str().unwrap()]),
        flags(&agent),
    ]
    .concat();
    refused("role", args, "--role control");

    // A data directory of another node, and one in use.
    let c9 = issue("control", "c9");
    let used = fleet.data().join("c1");
    let args = [control(&["--data-dir", used.to_str().unwrap()]), flags(&c9)].concat();
    refused("in use", args.clone(), "in use");
    fleet.kill("c1");
    refused("another node's", args, "belongs to node c1");

    // Another CA: no trust, and it says so.
    let operator = issue("operator/admin", "alice");
    let address = fleet.process("c1").addresses["quic"].clone();
    fleet.start_again(&["c1"]);
    fleet.wait_for_control(1);
    let args = [
        vec!["members".into(), "--control".into(), address],
        flags(&operator),
    ]
    .concat();
    let output = forebay().args(&args).output().unwrap();
    let text = [output.stdout, output.stderr].concat();
    assert_eq!(
        output.status.code(),
        Some(7),
        "{}",
        String::from_utf8_lossy(&text)
    );
    assert!(
        String::from_utf8_lossy(&text).contains("trust"),
        "{}",
        String::from_utf8_lossy(&text)
    );

    // A port that is taken.
    let taken = fleet.url.strip_prefix("http://").unwrap().to_owned();
    let data = other.path().join("second");
    let args = [
        "dev",
        "--listen",
        &taken,
        "--data-dir",
        data.to_str().unwrap(),
    ];
    refused("port", args.map(str::to_owned).to_vec(), "taken");
    let same = fleet.data();
    let args = [
        "dev",
        "--listen",
        "127.0.0.1:0",
        "--data-dir",
        same.to_str().unwrap(),
    ];
    refused("data dir", args.map(str::to_owned).to_vec(), "in use");
}
