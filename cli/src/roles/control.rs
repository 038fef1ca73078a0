//! `forebay control`: a control node, with the controller that works while it leads.

use std::fmt;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::{Arc, OnceLock};

use clap::Args;
use forebay_admin::prometheus_client::collector::Collector;
use forebay_admin::prometheus_client::encoding::DescriptorEncoder;
use forebay_admin::prometheus_client::metrics::MetricType;
use forebay_admin::prometheus_client::registry::Registry;
use forebay_admin::{Admin, Page};
use forebay_consensus::replica::ReplicaOptions;
use forebay_consensus::server::{self, Config, Leader};

use super::ProcessArgs;
use crate::context::CertificateArgs;
use crate::exit::CliError;
use crate::output::say;
use crate::settings::required;

/// Options of `forebay control`.
#[derive(Debug, Args)]
#[command(
    after_help = "Example:\n  forebay control --data-dir /var/lib/forebay --ca ca.pem --cert c1.pem --key c1-key.pem\n\nA node with an empty disk waits until `forebay init` makes it a member; its address is the one\ngiven there. Its name is the one in its certificate."
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
    };
    args.process.enter()?;
    super::threads()?.block_on(async {
        let stop = super::asked_to_stop()?;
        tokio::pin!(stop);
        let member = Arc::new(Member::default());
        // Before the disk is opened: a taken port should be found while nothing was touched.
        let admin = forebay_admin::serve(args.admin, pages(&member)).await?;
        let node = server::start(config).await?;
        let name = node.name();
        say(&format!(
            "control {name} ready: on {}, admin http://{admin}",
            args.listen
        ));
        let leader = tokio::select! {
            leader = node.leader() => leader,
            () = &mut stop => return Ok(node.run(std::future::ready(())).await?),
        };
        if let Some(leader) = leader {
            let leader = member.0.get_or_init(|| leader).clone();
            tokio::spawn(forebay_controller::run(Arc::new(leader)));
        }
        Ok(node.run(stop).await?)
    })
}

/// The node as a member; empty while it waits for `forebay init`.
#[derive(Default)]
struct Member(OnceLock<Leader>);

fn pages(member: &Arc<Member>) -> Admin {
    let mut registry = Registry::with_prefix("forebay_control");
    registry.register_collector(Box::new(member.clone()));
    let mut admin = Admin::new("control node", registry);
    let ready = member.clone();
    admin.ready = Box::new(move || match ready.0.get() {
        Some(_) => Ok(()),
        None => Err(vec!["belongs to no cluster yet: run `forebay init`".into()]),
    });
    let facts = member.clone();
    admin.pages.push(Page {
        path: "/debug/facts",
        about: "the facts as this node has applied them, in numbers",
        render: Box::new(move || facts.json()),
    });
    admin
}

impl Member {
    fn json(&self) -> serde_json::Value {
        let Some(leader) = self.0.get() else {
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

impl fmt::Debug for Member {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Member({})", self.0.get().is_some())
    }
}

impl Collector for Member {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let leader = self.0.get();
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
        ] {
            encoder
                .encode_descriptor(name, help, None, MetricType::Gauge)?
                .encode_gauge(&value)?;
        }
        Ok(())
    }
}
