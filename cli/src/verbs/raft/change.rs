//! `forebay raft add`, `promote`, `remove` and `transfer`: other members, and another leader.

use clap::Args;
use forebay_control_client::Group;
use forebay_proto::fleet::Member;
use forebay_proto::wire::fleet::ChangeMembers;
use forebay_proto::{NodeId, Revision};
use serde::Serialize;

use super::find;
use super::members::{Row, page, rows};
use crate::context::ContextArgs;
use crate::exit::{CliError, Exit};
use crate::output::{OutputArgs, say};
use crate::verbs::ask::Asked;

/// What all of them take.
#[derive(Debug, Args)]
struct ChangeArgs {
    /// Why, for the audit.
    #[arg(long, value_name = "TEXT", default_value = "")]
    reason: String,
    #[command(flatten)]
    output: OutputArgs,
    #[command(flatten)]
    context: ContextArgs,
}

/// Options of `forebay raft add`.
#[derive(Debug, Args)]
#[command(
    after_help = "Example:\n  forebay raft add c4:7400 --reason 'replaces c2'\n  forebay raft promote c4\n\nThe node has to run on an empty data directory, with a control certificate of the same authority; its name is the one in that. An add that was interrupted is finished by the same command. Exits with 3 when the node has its place but has not caught up in time; it goes on by itself.\n\nUndo: forebay raft remove NAME."
)]
pub(crate) struct AddArgs {
    /// Where the node listens, HOST:PORT, as the other control nodes reach it.
    #[arg(value_name = "ADDRESS")]
    address: String,
    #[command(flatten)]
    change: ChangeArgs,
}

/// Options of `forebay raft promote`.
#[derive(Debug, Args)]
#[command(
    after_help = "Example:\n  forebay raft promote c4\n\nRefused while the learner lacks too many entries, or where the votes that would then be needed do not answer.\n\nUndo: forebay raft remove NAME."
)]
pub(crate) struct PromoteArgs {
    /// The learner's name or id.
    #[arg(value_name = "NODE")]
    node: String,
    #[command(flatten)]
    change: ChangeArgs,
}

/// Options of `forebay raft remove`.
#[derive(Debug, Args)]
#[command(
    after_help = "Example:\n  forebay raft remove c2 --reason 'host is gone'\n\nThe leader is never removed in place: `forebay raft transfer` first. Refused where the votes that remain would be no majority that answers. A node that was removed stays up, says so, and takes no part; to have it back, move its data directory away and add it as a new node."
)]
pub(crate) struct RemoveArgs {
    /// The member's name or id.
    #[arg(value_name = "NODE")]
    node: String,
    #[command(flatten)]
    change: ChangeArgs,
}

/// Options of `forebay raft transfer`.
#[derive(Debug, Args)]
#[command(
    after_help = "Example:\n  forebay raft transfer c2 --reason 'c1 gets a new disk'\n\nRequests do not notice; changes wait for the time of an election. The reason goes to the leader's log: no fact changes, so there is no entry of the audit."
)]
pub(crate) struct TransferArgs {
    /// The voter's name or id.
    #[arg(value_name = "NODE")]
    node: String,
    #[command(flatten)]
    change: ChangeArgs,
}

#[derive(Serialize)]
struct Changed {
    schema_version: u32,
    node: NodeId,
    name: String,
    unchanged: bool,
    /// Of the change; null where no fact changed.
    revision: Option<Revision>,
    members: Vec<Row>,
}

/// Runs `forebay raft add`.
pub(super) fn add(args: &AddArgs) -> Result<(), CliError> {
    with(&args.change, async |asked, change| {
        let (client, timeout) = (&asked.client, asked.timeout);
        let (member, unchanged) = client
            .add_member(&args.address, &change.reason, timeout)
            .await?;
        let caught_up = client.caught_up(&member, timeout).await;
        done(&asked, change, &member, unchanged, None).await?;
        if !caught_up {
            return Err(CliError::because(
                Exit::TimedOut,
                format!(
                    "{} has its place and has not caught up within {} s; it goes on: see `forebay raft members`",
                    member.name,
                    timeout.as_secs()
                ),
            ));
        }
        if member.learner {
            let name = &member.name;
            say(&format!(
                "{name} follows without a vote; next: forebay raft promote {name}"
            ));
        }
        Ok(())
    })
}

/// Runs `forebay raft promote`.
pub(super) fn promote(args: &PromoteArgs) -> Result<(), CliError> {
    with(&args.change, async |asked, change| {
        let group = asked.group().await?;
        let member = find(&group, &args.node)?;
        if !member.learner {
            return done(&asked, change, member, true, None).await;
        }
        let promote = ChangeMembers {
            promote: vec![member.id.0],
            ..ChangeMembers::default()
        };
        agree(&asked, change, member, promote).await
    })
}

/// Runs `forebay raft remove`.
pub(super) fn remove(args: &RemoveArgs) -> Result<(), CliError> {
    with(&args.change, async |asked, change| {
        let group = asked.group().await?;
        let member = find(&group, &args.node)?;
        if member.id == group.leader {
            return Err(leads(&group, member));
        }
        let remove = ChangeMembers {
            remove: vec![member.id.0],
            ..ChangeMembers::default()
        };
        agree(&asked, change, member, remove).await
    })
}

/// Runs `forebay raft transfer`.
pub(super) fn transfer(args: &TransferArgs) -> Result<(), CliError> {
    with(&args.change, async |asked, change| {
        let group = asked.group().await?;
        let member = find(&group, &args.node)?;
        if member.learner {
            let name = &member.name;
            return Err(CliError::because(
                Exit::Refused,
                format!("{name} has no vote: `forebay raft promote {name}` first"),
            ));
        }
        let unchanged = asked
            .client
            .transfer(member.id, &change.reason, asked.timeout)
            .await?;
        done(&asked, change, member, unchanged, None).await
    })
}

fn with(
    change: &ChangeArgs,
    act: impl AsyncFnOnce(Asked, &ChangeArgs) -> Result<(), CliError>,
) -> Result<(), CliError> {
    let context = change.context.resolve()?;
    crate::roles::thread()?.block_on(async { act(Asked::new(context)?, change).await })
}

async fn agree(
    asked: &Asked,
    args: &ChangeArgs,
    member: &Member,
    change: ChangeMembers,
) -> Result<(), CliError> {
    let (reason, timeout) = (&args.reason, asked.timeout);
    let agreed = asked.client.change_members(change, reason, timeout).await?;
    let revision = Some(agreed.revision);
    done(asked, args, member, agreed.unchanged, revision).await
}

/// Prints what became of it: the group as it is then.
async fn done(
    asked: &Asked,
    args: &ChangeArgs,
    member: &Member,
    unchanged: bool,
    revision: Option<Revision>,
) -> Result<(), CliError> {
    let group = asked.group().await?;
    let changed = Changed {
        schema_version: 1,
        node: member.id,
        name: member.name.clone(),
        unchanged,
        revision,
        members: rows(&group),
    };
    args.output.print(&changed, || {
        let nothing = if unchanged {
            "nothing to change\n\n"
        } else {
            ""
        };
        format!("{nothing}{}", page(&changed.members))
    });
    Ok(())
}

/// The leader is not removed in place: who could take over.
fn leads(group: &Group, member: &Member) -> CliError {
    let voters = group.members.iter().filter(|other| !other.learner);
    let others = voters.filter(|other| other.id != member.id);
    // The one that is furthest takes over at once.
    let next = others.max_by_key(|other| {
        let peer = group.peers.iter().find(|peer| peer.node_id == other.id.0);
        peer.map_or(0, |peer| peer.matched)
    });
    let name = &member.name;
    let remedy = next.map_or_else(
        || "it is the only one with a vote: add and promote another node first".to_owned(),
        |next| {
            let to = &next.name;
            format!(
                "hand over first: `forebay raft transfer {to}`, then `forebay raft remove {name}`"
            )
        },
    );
    CliError::because(Exit::Refused, format!("{name} leads: {remedy}"))
}
