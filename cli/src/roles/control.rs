//! `forebay control`: a control node, with the controller that works while it leads.

use std::fmt;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use clap::Args;
use forebay_admin::prometheus_client::collector::Collector;
use forebay_admin::prometheus_client::encoding::DescriptorEncoder;
use forebay_admin::prometheus_client::metrics::MetricType;
use forebay_admin::prometheus_client::registry::Registry;
use forebay_admin::{Admin, Content, Page};
use forebay_consensus::replica::ReplicaOptions;
use forebay_consensus::server::{self, Config, ControlNode, Leader};
use forebay_proto::wire::control::NodeStatus;

use super::ProcessArgs;
use crate::context::CertificateArgs;
use crate::exit::CliError;
use crate::settings::required;

/// Options of `forebay control`.
#[derive(Debug, Args)]
#[command(
    after_help = "Example:\n  forebay control --data-dir /var/lib/forebay --ca ca.pem --cert c1.pem --key c1-key.pem\n\nA node with an empty disk waits until `forebay init`, or `forebay raft add` for a cluster that exists, makes it a member; its address is the one given there. Its name is the one in its certificate."
)]
pub(crate) struct ControlArgs {
    /// Its disk: log, snapshots, identity. Losing it means joining anew as another node.
    #[arg(long, value_name = "DIR", env = "FOREBAY_DATA_DIR")]
    data_dir: Option<PathBuf>,
    /// Where it listens (UDP).
    #[arg(
        long,
        value_name = "ADDRESS",
        default_value = "0.0.0.0:7400",
        env = "FOREBAY_LISTEN"
    )]
    listen: SocketAddr,
    /// Where its health and metrics are (TCP); they are not for everybody.
    #[arg(
        long,
        value_name = "ADDRESS",
        default_value = "127.0.0.1:7401",
        env = "FOREBAY_ADMIN"
    )]
    admin: SocketAddr,
    /// Above so many bytes of files in its data directory the audit's oldest entries give way, on this node; an entry
    /// takes about half a KiB.
    #[arg(
        long,
        value_name = "BYTES",
        default_value_t = 1 << 30,
        env = "FOREBAY_AUDIT_BYTES"
    )]
    audit_bytes: u64,
    #[command(flatten)]
    certificate: CertificateArgs,
    #[command(flatten)]
    process: ProcessArgs,
}

/// Runs a control node until it is asked to stop.
pub(crate) fn run(args: ControlArgs) -> Result<(), CliError> {
    let config = Config {
        data_dir: required("data-dir", args.data_dir)?,
        listen: args.listen,
        credentials: args.certificate.paths()?,
        replica: ReplicaOptions::default(),
        audit_bytes: args.audit_bytes,
    };
    args.process.enter()?;
    super::threads()?.block_on(async {
        let stop = super::asked_to_stop()?;
        tokio::pin!(stop);
        let member = Arc::new(Member {
            data_dir: config.data_dir.clone(),
            ..Member::default()
        });
        // Before the disk is opened: a taken port should be found while nothing was touched.
        let admin = forebay_admin::serve(args.admin, pages(&member)).await?;
        let node = server::start(config).await?;
        node.plan_with(Arc::new(forebay_controller::Rebalancer));
        let name = node.name();
        member.node.get_or_init(|| node.clone());
        tracing::info!(
            "control {name} answers: on {}, admin http://{admin}",
            args.listen
        );
        let leader = tokio::select! {
            leader = node.leader() => leader,
            () = &mut stop => return Ok(node.run(std::future::ready(())).await?),
        };
        if let Some(leader) = leader {
            let leader = member.leader.get_or_init(|| leader).clone();
            tokio::spawn(forebay_controller::run(Arc::new(leader)));
        }
        Ok(node.run(stop).await?)
    })
}

/// The node: what it says of itself, and its side of leading.
#[derive(Default)]
struct Member {
    /// Its disk.
    data_dir: PathBuf,
    /// Empty until its disk is open.
    node: OnceLock<ControlNode>,
    /// Empty while it waits for `forebay init`.
    leader: OnceLock<Leader>,
}

fn pages(member: &Arc<Member>) -> Admin {
    let mut registry = Registry::with_prefix("forebay_control");
    registry.register_collector(Box::new(member.clone()));
    let mut admin = Admin::new("control node", registry);
    let ready = member.clone();
    admin.ready = Box::new(move || match ready.node.get() {
        Some(node) => readiness(&node.status()),
        None => Err(vec!["its disk is being opened".into()]),
    });
    let facts = member.clone();
    admin.pages.push(Page {
        path: "/debug/facts",
        about: "the facts as this node has applied them, in numbers",
        render: Box::new(move || Content::Json(facts.json())),
    });
    admin
}

/// Whether a node takes part, else every reason why not.
fn readiness(status: &NodeStatus) -> Result<(), Vec<String>> {
    let mut reasons = vec![];
    if !status.problem.is_empty() {
        reasons.push(status.problem.clone());
    }
    if !status.initialised {
        // One that says why it stopped was a member.
        if status.problem.is_empty() {
            reasons.push(
                "belongs to no cluster yet: run `forebay init`, or `forebay raft add` for one that exists"
                    .into(),
            );
        }
    } else if status.leader != status.node_id && status.leader_heard_ms > LEADERLESS_MS {
        reasons.push(format!(
            "no leader was heard for {} ms: look at the other control nodes and the network between",
            status.leader_heard_ms
        ));
    }
    if reasons.is_empty() {
        Ok(())
    } else {
        Err(reasons)
    }
}

/// Longer than an election takes.
const LEADERLESS_MS: u64 = 2_000;

impl Member {
    fn json(&self) -> serde_json::Value {
        let Some(leader) = self.leader.get() else {
            return serde_json::json!({"member": false});
        };
        let facts = leader.facts();
        serde_json::json!({
            "member": true,
            "leader": leader.is_leader(),
            "revision": facts.revision,
            "config_revision": facts.config_revision,
            "workers": facts.workers.len(),
            "members": facts.members.len(),
        })
    }
}

/// -1: the system does not say.
fn free_bytes(dir: &Path) -> i64 {
    let left = rustix::fs::statvfs(dir).ok();
    let bytes = left.and_then(|left| left.f_bavail.checked_mul(left.f_frsize));
    bytes.map_or(-1, |bytes| i64::try_from(bytes).unwrap_or(i64::MAX))
}

impl fmt::Debug for Member {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Member({})", self.leader.get().is_some())
    }
}

impl Collector for Member {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let leader = self.leader.get();
        let facts = leader.map(Leader::facts);
        let lost = facts.iter().flat_map(|facts| &facts.workers);
        let lost = lost.filter(|worker| worker.lost).count();
        let count = |number: usize| i64::try_from(number).unwrap_or(i64::MAX);
        let revision = facts.as_ref().map_or(0, |facts| facts.revision);
        let workers = facts.as_ref().map_or(0, |facts| facts.workers.len());
        for (name, help, value) in [
            (
                "member",
                "Whether the node belongs to a cluster.",
                i64::from(leader.is_some()),
            ),
            (
                "leader",
                "Whether the node leads, as far as it knows.",
                i64::from(leader.is_some_and(Leader::is_leader)),
            ),
            (
                "revision",
                "Revision of the facts that the node has applied.",
                i64::try_from(revision).unwrap_or(i64::MAX),
            ),
            ("workers", "Workers that are registered.", count(workers)),
            ("workers_lost", "Workers whose lease ran out.", count(lost)),
            (
                "disk_free_bytes",
                "What the data directory's file system has left for it.",
                free_bytes(&self.data_dir),
            ),
        ] {
            encoder
                .encode_descriptor(name, help, None, MetricType::Gauge)?
                .encode_gauge(&value)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(change: impl FnOnce(&mut NodeStatus), says: &[&str]) {
        let mut status = NodeStatus {
            initialised: true,
            node_id: 1,
            leader: 2,
            leader_heard_ms: 100,
            ..NodeStatus::default()
        };
        change(&mut status);
        let reasons = readiness(&status).err().unwrap_or_default();
        assert_eq!(reasons.len(), says.len(), "{reasons:?}");
        for (reason, text) in reasons.iter().zip(says) {
            assert!(reason.contains(text), "{reason}");
        }
    }

    #[test]
    fn a_node_is_ready_while_it_takes_part_and_hears_a_leader() {
        check(|_| {}, &[]);
        check(|s| s.initialised = false, &["forebay init"]);
        // An election is no reason yet.
        check(|s| (s.leader, s.leader_heard_ms) = (0, 2_000), &[]);
        check(
            |s| (s.leader, s.leader_heard_ms) = (0, 2_001),
            &["no leader was heard for 2001 ms"],
        );
        check(|s| s.leader_heard_ms = 9_000, &["no leader"]);
        check(|s| (s.leader, s.leader_heard_ms) = (1, 0), &[]);
        check(|s| s.problem = "lost its disk".into(), &["lost its disk"]);
        let stopped = |s: &mut NodeStatus| {
            s.initialised = false;
            s.problem = "the disk is full".into();
        };
        check(stopped, &["the disk is full"]);
    }
}
