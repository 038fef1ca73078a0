//! `forebay raft members`: the group by the word of its leader.

use clap::Args;
use forebay_control_client::Group;
use forebay_proto::{ClusterId, NodeId, StoreId};
use serde::Serialize;

use crate::context::ContextArgs;
use crate::exit::CliError;
use crate::output::{OutputArgs, table};
use crate::verbs::ask::Asked;

/// Options of `forebay raft members`.
#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  forebay raft members\n  forebay raft members --output json\n\nThe leader is asked, so this needs a quorum; without one, `forebay members` shows each node as it sees itself."
)]
pub(crate) struct MembersArgs {
    #[command(flatten)]
    output: OutputArgs,
    #[command(flatten)]
    context: ContextArgs,
}

#[derive(Serialize)]
struct Members {
    schema_version: u32,
    cluster_id: ClusterId,
    /// Where the leader's log ends.
    last_index: u64,
    members: Vec<Row>,
}

/// One member.
#[derive(Debug, PartialEq, Eq, Serialize)]
pub(super) struct Row {
    id: NodeId,
    name: String,
    address: String,
    role: &'static str,
    leader: bool,
    store_id: StoreId,
    /// The last entry that it acknowledged; zero: none yet.
    matched: u64,
    /// Entries that it lacks.
    behind: u64,
    /// Since the leader heard it; null: not since the leader started.
    heard_ms: Option<u64>,
}

/// Runs `forebay raft members`.
pub(super) fn run(args: &MembersArgs) -> Result<(), CliError> {
    let context = args.context.resolve()?;
    crate::roles::thread()?.block_on(async {
        let asked = Asked::new(context)?;
        let group = asked.group().await?;
        let members = Members {
            schema_version: 1,
            cluster_id: group.cluster_id,
            last_index: group.last_index,
            members: rows(&group),
        };
        args.output.print(&members, || page(&members.members));
        Ok(())
    })
}

/// The members of a group.
pub(super) fn rows(group: &Group) -> Vec<Row> {
    let rows = group.members.iter().map(|member| {
        let leader = member.id == group.leader;
        let peer = group.peers.iter().find(|peer| peer.node_id == member.id.0);
        let matched = if leader {
            group.last_index
        } else {
            peer.map_or(0, |peer| peer.matched)
        };
        Row {
            id: member.id,
            name: member.name.clone(),
            address: member.address.clone(),
            role: if member.learner { "learner" } else { "voter" },
            leader,
            store_id: member.store_id,
            matched,
            behind: group.last_index.saturating_sub(matched),
            heard_ms: if leader {
                Some(0)
            } else {
                peer.and_then(|peer| peer.heard_ms)
            },
        }
    });
    rows.collect()
}

/// The members as a table.
pub(super) fn page(rows: &[Row]) -> String {
    let rows = rows.iter().map(|row| {
        [
            row.id.to_string(),
            row.name.clone(),
            row.address.clone(),
            row.role.into(),
            if row.leader { "yes" } else { "" }.into(),
            row.matched.to_string(),
            row.behind.to_string(),
            row.heard_ms
                .map_or_else(|| "never".into(), |ms| format!("{ms} ms ago")),
        ]
    });
    table(
        [
            "ID", "NAME", "ADDRESS", "ROLE", "LEADER", "MATCHED", "BEHIND", "HEARD",
        ],
        rows,
    )
}

#[cfg(test)]
mod tests {
    use forebay_proto::fleet::Member;
    use forebay_proto::wire::control::PeerStatus;

    use super::*;

    #[test]
    fn a_row_has_what_the_leader_knows_of_each() {
        let member = |id, learner| Member {
            id: NodeId(id),
            name: format!("c{id}"),
            address: format!("h{id}:1"),
            store_id: StoreId([1; 16]),
            learner,
        };
        let group = Group {
            cluster_id: ClusterId([1; 16]),
            members: vec![member(1, false), member(2, false), member(3, true)],
            newest: NodeId(3),
            leader: NodeId(1),
            last_index: 100,
            peers: vec![PeerStatus {
                node_id: 2,
                matched: 90,
                heard_ms: Some(40),
            }],
        };
        let rows = rows(&group);
        let seen: Vec<_> = rows
            .iter()
            .map(|row| (row.role, row.leader, row.behind, row.heard_ms))
            .collect();
        assert_eq!(
            seen,
            [
                ("voter", true, 0, Some(0)),
                ("voter", false, 10, Some(40)),
                ("learner", false, 100, None)
            ]
        );
        assert!(page(&rows).contains("never"));
    }
}
