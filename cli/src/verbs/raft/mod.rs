//! `forebay raft`: the control plane's own members, their leader, backups, and how fast they agree.

mod change;
mod members;
mod perf;
mod snapshot;

use clap::{Args, Subcommand};
use forebay_control_client::Group;
use forebay_proto::fleet::Member;

use crate::exit::{CliError, Exit};

/// Options of `forebay raft`.
#[derive(Debug, Args)]
pub(crate) struct RaftArgs {
    #[command(subcommand)]
    verb: RaftVerb,
}

#[derive(Debug, Subcommand)]
enum RaftVerb {
    /// Show the members as their leader sees them: who votes, and how far each is.
    Members(members::MembersArgs),
    /// Add an empty control node, as a learner that follows without a vote.
    Add(change::AddArgs),
    /// Give a learner that has caught up a vote.
    Promote(change::PromoteArgs),
    /// Remove a member for good; its id is never used again.
    Remove(change::RemoveArgs),
    /// Hand the leadership over.
    Transfer(change::TransferArgs),
    /// Save the whole state to a file, look into such a file, or begin a new cluster from it.
    Snapshot(snapshot::SnapshotArgs),
    /// Write at a bounded rate for a while and say whether the control plane keeps up.
    CheckPerf(perf::CheckPerfArgs),
}

/// Runs `forebay raft`.
pub(crate) fn run(args: RaftArgs) -> Result<(), CliError> {
    match args.verb {
        RaftVerb::Members(args) => members::run(&args),
        RaftVerb::Add(args) => change::add(&args),
        RaftVerb::Promote(args) => change::promote(&args),
        RaftVerb::Remove(args) => change::remove(&args),
        RaftVerb::Transfer(args) => change::transfer(&args),
        RaftVerb::Snapshot(args) => snapshot::run(args),
        RaftVerb::CheckPerf(args) => perf::run(&args),
    }
}

/// The member of this name or id.
fn find<'a>(group: &'a Group, node: &str) -> Result<&'a Member, CliError> {
    group.find(node).ok_or_else(|| {
        let names: Vec<&str> = group.members.iter().map(|one| one.name.as_str()).collect();
        CliError::because(
            Exit::NotFound,
            format!(
                "{node} is not a member: the members are {}",
                names.join(", ")
            ),
        )
    })
}
