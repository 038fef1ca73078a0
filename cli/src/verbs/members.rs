//! `forebay members`: the control nodes, each as it sees itself; works without a quorum.

use clap::Args;
use forebay_proto::{NodeId, StoreId};
use serde::Serialize;

use super::ask::{Asked, Node, without_address};
use crate::context::ContextArgs;
use crate::exit::{CliError, Exit};
use crate::output::{OutputArgs, table};

/// Options of `forebay members`.
#[derive(Debug, Args)]
#[command(after_help = "Exits with 7 when no node answers.")]
pub(crate) struct MembersArgs {
    #[command(flatten)]
    output: OutputArgs,
    #[command(flatten)]
    context: ContextArgs,
}

#[derive(Serialize)]
struct Members {
    schema_version: u32,
    members: Vec<Row>,
}

/// One node. What a node does not tell is null.
#[derive(Debug, Serialize)]
pub(crate) struct Row {
    pub(crate) name: String,
    pub(crate) id: Option<NodeId>,
    pub(crate) address: String,
    pub(crate) reachable: bool,
    pub(crate) leader: bool,
    pub(crate) role: Option<String>,
    pub(crate) term: Option<u64>,
    pub(crate) applied: Option<u64>,
    pub(crate) commit: Option<u64>,
    pub(crate) last_index: Option<u64>,
    pub(crate) leader_heard_ms: Option<u64>,
    pub(crate) store_id: Option<StoreId>,
    pub(crate) build: Option<String>,
    pub(crate) error: Option<String>,
}

impl Row {
    pub(crate) fn of(node: &Node) -> Self {
        let status = node.status.as_ref().ok();
        let known_store = node.member.as_ref().and_then(|(_, _, store)| *store);
        let problem = status.map(|status| status.problem.clone());
        Self {
            name: node.name(),
            id: node.id(),
            address: node.address.clone(),
            reachable: status.is_some(),
            leader: node.leads(),
            role: status.map(|status| status.role.clone()),
            term: status.map(|status| status.term),
            applied: status.map(|status| status.applied),
            commit: status.map(|status| status.commit),
            last_index: status.map(|status| status.last_index),
            leader_heard_ms: status.map(|status| status.leader_heard_ms),
            store_id: status
                .and_then(|status| StoreId::from_wire(&status.store_id).ok())
                .or(known_store),
            build: status.map(|status| status.build.clone()),
            error: match &node.status {
                Err(error) => Some(without_address(&node.address, error)),
                Ok(_) => problem.filter(|problem| !problem.is_empty()),
            },
        }
    }
}

/// Runs `forebay members`.
pub(crate) fn run(args: &MembersArgs) -> Result<(), CliError> {
    let context = args.context.resolve()?;
    crate::roles::thread()?.block_on(async {
        let asked = Asked::new(context)?;
        let nodes = asked.nodes().await;
        let members = Members {
            schema_version: 1,
            members: nodes.iter().map(Row::of).collect(),
        };
        args.output.print(&members, || page(&members.members));
        if members.members.iter().any(|row| row.reachable) {
            return Ok(());
        }
        Err(CliError::because(
            Exit::Unreachable,
            format!(
                "no control node answers at {}: start them, or check addresses and certificates of the context",
                asked.control().join(", ")
            ),
        ))
    })
}

/// The nodes as a table.
pub(super) fn page(rows: &[Row]) -> String {
    let number = |value: Option<u64>| value.map_or_else(String::new, |value| value.to_string());
    let rows = rows.iter().map(|row| {
        [
            row.name.clone(),
            row.id.map_or_else(String::new, |id| id.to_string()),
            row.address.clone(),
            row.role.clone().unwrap_or_else(|| "unreachable".into()),
            number(row.term),
            number(row.applied),
            number(row.commit),
            row.error.clone().unwrap_or_default(),
        ]
    });
    table(
        [
            "NAME", "ID", "ADDRESS", "ROLE", "TERM", "APPLIED", "COMMIT", "PROBLEM",
        ],
        rows,
    )
}
