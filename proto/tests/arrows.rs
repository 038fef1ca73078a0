//! Which crate may depend on which. A new arrow is a design change, argued in ARCHITECTURE.md.

#![allow(clippy::unwrap_used, clippy::panic)] // helpers of a test fail as its assertions do

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

/// Folder, package, and the packages of ours that it may use; `*` means any.
const ALLOWED: &[(&str, &str, &str)] = &[
    ("proto", "forebay-proto", ""),
    ("proto/admin", "forebay-admin", ""),
    ("proto/link", "forebay-link", "forebay-proto"),
    ("scheduler", "forebay-scheduler", "forebay-proto"),
    (
        "consensus",
        "forebay-consensus",
        "forebay-proto forebay-link",
    ),
    (
        "consensus/client",
        "forebay-control-client",
        "forebay-proto forebay-link",
    ),
    (
        "consensus/controller",
        "forebay-controller",
        "forebay-proto forebay-consensus forebay-scheduler",
    ),
    (
        "balancer",
        "forebay-balancer",
        "forebay-proto forebay-link forebay-admin forebay-scheduler forebay-control-client",
    ),
    (
        "worker-agent",
        "forebay-worker-agent",
        "forebay-proto forebay-link forebay-admin forebay-scheduler forebay-control-client",
    ),
    (
        "sim",
        "forebay-sim",
        "forebay-proto forebay-scheduler forebay-consensus forebay-control-client forebay-controller forebay-balancer forebay-worker-agent",
    ),
    ("benches", "forebay-benches", "*"),
    ("cli", "forebay", "*"),
];

/// What a crate that promises purity must not even be able to reach.
const IMPURE: &[&str] = &[
    "tokio",
    "quinn",
    "hyper",
    "hyper-util",
    "axum",
    "reqwest",
    "socket2",
];
const PURE: &[&str] = &["proto", "scheduler"];

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .unwrap()
        .to_owned()
}

fn manifest(folder: &str) -> toml::Table {
    let path = root().join(folder).join("Cargo.toml");
    fs::read_to_string(&path)
        .unwrap_or_else(|e| panic!("{path:?}: {e}"))
        .parse()
        .unwrap()
}

fn dependencies(manifest: &toml::Table) -> BTreeSet<String> {
    let table = manifest.get("dependencies").and_then(toml::Value::as_table);
    table
        .map(|table| table.keys().cloned().collect())
        .unwrap_or_default()
}

#[test]
fn every_arrow_is_allowed() {
    let mut wrong = Vec::new();
    for (folder, package, allowed) in ALLOWED {
        let manifest = manifest(folder);
        assert_eq!(
            manifest["package"]["name"].as_str(),
            Some(*package),
            "{folder}"
        );
        let allowed: BTreeSet<&str> = allowed.split_whitespace().collect();
        for dependency in dependencies(&manifest) {
            let ours = dependency.starts_with("forebay");
            if ours && !allowed.contains("*") && !allowed.contains(dependency.as_str()) {
                wrong.push(format!("{package} -> {dependency}"));
            }
        }
    }
    assert!(wrong.is_empty(), "forbidden: {wrong:?}");
}

#[test]
fn every_member_of_the_workspace_has_its_row() {
    let workspace = manifest("");
    let members: BTreeSet<&str> = workspace["workspace"]["members"]
        .as_array()
        .unwrap()
        .iter()
        .filter_map(toml::Value::as_str)
        .collect();
    assert_eq!(
        members,
        ALLOWED.iter().map(|(folder, ..)| *folder).collect()
    );
}

#[test]
fn pure_crates_cannot_reach_sockets_or_runtimes_and_ban_clocks() {
    for folder in PURE {
        let reached: Vec<_> = dependencies(&manifest(folder))
            .into_iter()
            .filter(|dependency| IMPURE.contains(&dependency.as_str()))
            .collect();
        assert!(reached.is_empty(), "{folder} reaches {reached:?}");
    }
    let pure_in_part = [
        "consensus",
        "consensus/client",
        "consensus/controller",
        "balancer",
        "worker-agent",
        "sim",
    ];
    for folder in PURE.iter().chain(&pure_in_part) {
        let bans = fs::read_to_string(root().join(folder).join("clippy.toml")).unwrap();
        for banned in [
            "std::time::Instant::now",
            "std::time::SystemTime::now",
            "rand::random",
        ] {
            assert!(
                bans.contains(banned),
                "{folder}/clippy.toml does not ban {banned}"
            );
        }
    }
}

/// Modules that must not know of others although they share a crate.
#[test]
fn the_raft_node_never_names_the_fleet() {
    let mut named = BTreeMap::new();
    for entry in fs::read_dir(root().join("consensus/src/node")).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|extension| extension == "rs") {
            let code = fs::read_to_string(&path).unwrap();
            let lines = code
                .lines()
                .filter(|line| !line.trim_start().starts_with("//"));
            let count = lines.filter(|line| line.contains("fleet")).count();
            if count > 0 {
                named.insert(path, count);
            }
        }
    }
    assert!(named.is_empty(), "{named:?}");
}
