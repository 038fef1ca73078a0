//! `forebay raft snapshot`: the whole state in a file, what is in it, and a new cluster from it.

use std::io::Write as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use clap::{Args, Subcommand};
use forebay_consensus::backup::{self, Backup};
use forebay_proto::{ClusterId, NodeId, Revision, StoreId};
use serde::Serialize;

use crate::context::ContextArgs;
use crate::exit::{CliError, Exit};
use crate::output::{OutputArgs, say};
use crate::verbs::ask::Asked;

/// Options of `forebay raft snapshot`.
#[derive(Debug, Args)]
pub(crate) struct SnapshotArgs {
    #[command(subcommand)]
    verb: SnapshotVerb,
}

#[derive(Debug, Subcommand)]
enum SnapshotVerb {
    /// Save the whole state of a running cluster, at least as new as all that was agreed before.
    Save(SaveArgs),
    /// Check a file and show what is in it; asks nobody.
    Inspect(InspectArgs),
    /// Make an empty data directory that of the only node of a new cluster; asks nobody.
    Restore(RestoreArgs),
}

#[derive(Debug, Args)]
#[command(
    after_help = "Example:\n  forebay raft snapshot save forebay-$(date +%F).snap\n\nThe file has all facts, the configuration and the audit's tail, but no fingerprint keys. An existing file is not overwritten."
)]
struct SaveArgs {
    /// The file to write.
    #[arg(value_name = "FILE")]
    file: PathBuf,
    #[command(flatten)]
    output: OutputArgs,
    #[command(flatten)]
    context: ContextArgs,
}

#[derive(Debug, Args)]
#[command(
    after_help = "Example:\n  forebay raft snapshot inspect forebay-2026-01-31.snap\n\nExits with 1 when a checksum does not hold."
)]
struct InspectArgs {
    /// The file to read.
    #[arg(value_name = "FILE")]
    file: PathBuf,
    #[command(flatten)]
    output: OutputArgs,
}

#[derive(Debug, Args)]
#[command(
    after_help = "Example:\n  forebay raft snapshot restore forebay-2026-01-31.snap --data-dir /var/lib/forebay --name c1 --address c1:7400\n  forebay control --data-dir /var/lib/forebay --ca ca.pem --cert c1.pem --key c1-key.pem\n  forebay raft add c2:7400\n\nFor a control plane whose majority is lost for good. The cluster gets a new id, because what was agreed on after the snapshot is not in it: stop all nodes of the old one first, and give agents and balancers data directories of their own."
)]
struct RestoreArgs {
    /// The file to read.
    #[arg(value_name = "FILE")]
    file: PathBuf,
    /// The data directory to make; has to be empty or missing.
    #[arg(long, value_name = "DIR")]
    data_dir: PathBuf,
    /// The node's name, as in its certificate.
    #[arg(long, value_name = "NAME")]
    name: String,
    /// Where it will listen, HOST:PORT, as other control nodes reach it.
    #[arg(long, value_name = "ADDRESS")]
    address: String,
    #[command(flatten)]
    output: OutputArgs,
}

/// What is in a file.
#[derive(Debug, Serialize)]
struct Content {
    schema_version: u32,
    file: PathBuf,
    bytes: u64,
    /// Of the file and of the state in it; a file where one is wrong is not shown.
    checksums: &'static str,
    cluster_id: ClusterId,
    index: u64,
    term: u64,
    revision: Revision,
    feature_level: u32,
    members: Vec<Node>,
    workers: usize,
    config_revision: Revision,
    audit_entries: u64,
    /// SHA-256 of the state: replicas and files with the same one hold the same.
    state_hash: String,
}

#[derive(Debug, Serialize)]
struct Node {
    id: NodeId,
    name: String,
    address: String,
    role: &'static str,
}

#[derive(Serialize)]
struct Restored {
    schema_version: u32,
    data_dir: PathBuf,
    cluster_id: ClusterId,
    node_id: NodeId,
    store_id: StoreId,
    /// The cluster whose state it is.
    from_cluster_id: ClusterId,
    index: u64,
    revision: Revision,
}

/// Runs `forebay raft snapshot`.
pub(super) fn run(args: SnapshotArgs) -> Result<(), CliError> {
    match args.verb {
        SnapshotVerb::Save(args) => save(&args),
        SnapshotVerb::Inspect(args) => inspect(&args),
        SnapshotVerb::Restore(args) => restore(&args),
    }
}

fn save(args: &SaveArgs) -> Result<(), CliError> {
    let exists = || {
        let message = format!("{} exists: it is not overwritten", args.file.display());
        CliError::because(Exit::Conflict, message)
    };
    if args.file.exists() {
        return Err(exists());
    }
    let context = args.context.resolve()?;
    let bytes = crate::roles::thread()?.block_on(async {
        let asked = Asked::new(context)?;
        let taken = asked.client.snapshot(asked.timeout).await;
        taken.map_err(crate::verbs::ask::of_read)
    })?;
    // What arrived is whole, or nothing is written.
    let content = content(&args.file, bytes.len(), &backup::read(bytes.clone())?);
    write(&args.file, &bytes).map_err(|error| match error.kind() {
        std::io::ErrorKind::AlreadyExists => exists(),
        _ => CliError::File {
            path: args.file.clone(),
            error,
        },
    })?;
    args.output.print(&content, || page(&content));
    Ok(())
}

/// Writes a file whole or not at all; nobody else may read it.
fn write(file: &Path, bytes: &[u8]) -> std::io::Result<()> {
    let mut unfinished = file.as_os_str().to_owned();
    unfinished.push(format!(".{}.unfinished", std::process::id()));
    let unfinished = PathBuf::from(unfinished);
    let written = std::fs::OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&unfinished)
        .and_then(|mut open| open.write_all(bytes).and_then(|()| open.sync_all()))
        // Unlike a rename, a link replaces nothing.
        .and_then(|()| std::fs::hard_link(&unfinished, file));
    let _ = std::fs::remove_file(&unfinished);
    written
}

fn read(file: &Path) -> Result<(usize, Backup), CliError> {
    let bytes = std::fs::read(file).map_err(|error| match error.kind() {
        std::io::ErrorKind::NotFound => {
            let message = format!("{}: no such file", file.display());
            CliError::because(Exit::NotFound, message)
        }
        _ => CliError::File {
            path: file.into(),
            error,
        },
    })?;
    let length = bytes.len();
    let backup = backup::read(bytes).map_err(|error| {
        let message = format!("{}: {error}", file.display());
        CliError::because(Exit::Failed, message)
    })?;
    Ok((length, backup))
}

fn inspect(args: &InspectArgs) -> Result<(), CliError> {
    let (bytes, backup) = read(&args.file)?;
    let content = content(&args.file, bytes, &backup);
    args.output.print(&content, || page(&content));
    Ok(())
}

fn restore(args: &RestoreArgs) -> Result<(), CliError> {
    let (_, backup) = read(&args.file)?;
    let (from_cluster_id, index, revision) = (
        backup.fleet.cluster_id(),
        backup.index,
        backup.fleet.revision(),
    );
    let drawn = ClusterId(rand::random());
    let founded = backup::restore(backup, &args.data_dir, drawn, &args.name, &args.address)?;
    let restored = Restored {
        schema_version: 1,
        data_dir: args.data_dir.clone(),
        cluster_id: founded.cluster_id,
        node_id: founded.node_id,
        store_id: founded.store_id,
        from_cluster_id,
        index,
        revision,
    };
    args.output.print(&restored, || {
        format!(
            "cluster   {}\nnode      {} {} at {}\nstate of  cluster {from_cluster_id} at {revision}",
            restored.cluster_id, restored.node_id, args.name, args.address
        )
    });
    say(&format!(
        "next: forebay control --data-dir {} with the certificate of {}",
        args.data_dir.display(),
        args.name
    ));
    Ok(())
}

fn content(file: &Path, bytes: usize, backup: &Backup) -> Content {
    let (fleet, members) = (&backup.fleet, &backup.members);
    let nodes = fleet.members().iter().map(|member| Node {
        id: member.id,
        name: member.name.clone(),
        address: member.address.clone(),
        role: if members.learners().contains(&member.id) {
            "learner"
        } else {
            "voter"
        },
    });
    let hex = |hash: [u8; 32]| hash.iter().map(|byte| format!("{byte:02x}")).collect();
    Content {
        schema_version: 1,
        file: file.into(),
        bytes: bytes as u64,
        checksums: "ok",
        cluster_id: fleet.cluster_id(),
        index: backup.index,
        term: backup.term,
        revision: fleet.revision(),
        feature_level: fleet.feature_level(),
        members: nodes.collect(),
        workers: fleet.workers().count(),
        config_revision: Revision(fleet.facts().config_revision),
        audit_entries: fleet.audit_count(),
        state_hash: hex(fleet.state_hash()),
    }
}

fn page(content: &Content) -> String {
    let members: Vec<String> = content
        .members
        .iter()
        .map(|node| {
            format!(
                "{} {} at {} ({})",
                node.id, node.name, node.address, node.role
            )
        })
        .collect();
    format!(
        "file       {} ({} bytes)\nchecksums  {}\ncluster    {}\nlog        index {}, term {}\nfacts      {}, feature level {}\nmembers    {}\nworkers    {}\nconfig     {}\naudit      {} entries\nstate      {}",
        content.file.display(),
        content.bytes,
        content.checksums,
        content.cluster_id,
        content.index,
        content.term,
        content.revision,
        content.feature_level,
        members.join("\n           "),
        content.workers,
        content.config_revision,
        content.audit_entries,
        content.state_hash,
    )
}
