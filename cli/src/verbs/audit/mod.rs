//! `forebay audit`: who changed what, from where, why, and what came of it.

mod file;
mod older;
mod tail;

use clap::{Args, Subcommand};
use forebay_consensus::fleet::archive::{Fault, Tail};
use forebay_consensus::fleet::audit::KEPT_ENTRIES;
use forebay_proto::{ClusterId, Millis};

use super::ask::{Asked, of_read};
use crate::exit::{CliError, Exit};

/// Options of `forebay audit`.
#[derive(Debug, Args)]
#[command(
    after_help = "Each change that was asked of the control plane is an entry, done or refused, linked to the one before it by its hash. The cluster keeps the newest 1,000, and each control node those that it saw in files of its own (`--audit-bytes`); `forebay audit export FILE`, repeated (daily, say), keeps them elsewhere."
)]
pub(crate) struct AuditArgs {
    #[command(subcommand)]
    verb: AuditVerb,
}

#[derive(Debug, Subcommand)]
enum AuditVerb {
    /// Show the newest entries.
    Tail(tail::TailArgs),
    /// Write the entries to a file, or add to it those that it has not.
    Export(file::ExportArgs),
    /// Check the chain: the cluster's, or a file's and that it is the cluster's.
    Verify(file::VerifyArgs),
}

/// Runs `forebay audit`.
pub(crate) fn run(args: &AuditArgs) -> Result<(), CliError> {
    match &args.verb {
        AuditVerb::Tail(args) => tail::run(args),
        AuditVerb::Export(args) => file::export(args),
        AuditVerb::Verify(args) => file::verify(args),
    }
}

/// The cluster's audit as agreed by now, checked, and the cell's time.
async fn newest(asked: &Asked) -> Result<(Tail, Millis), CliError> {
    let facts = asked.read().await?;
    let tail = kept(asked, facts.cluster_id, KEPT_ENTRIES).await?;
    Ok((tail, facts.cell_time))
}

/// The newest `most` entries.
async fn kept(asked: &Asked, cluster_id: ClusterId, most: usize) -> Result<Tail, CliError> {
    let limit = u32::try_from(most).unwrap_or(u32::MAX);
    let told = asked.client.agreed_audit(limit, asked.timeout).await;
    let told = told.map_err(of_read)?;
    let count = told.count.ok_or_else(|| {
        let message = "this control node does not number the audit's entries: change its version";
        CliError::because(Exit::Failed, message)
    })?;
    let tail = Tail::new(cluster_id, count, &told.entries, &told.head);
    tail.map_err(|fault| broken("the cluster's audit", &fault))
}

fn broken(whose: &str, fault: &Fault) -> CliError {
    CliError::because(Exit::Failed, format!("{whose} is not whole: {fault}"))
}

/// What is to be known of entries that are no more, if there are any.
fn beginning(begins: u64) -> Option<String> {
    (begins > 1).then(|| {
        format!(
            "the chain begins at entry {begins} here: older ones are in no control node's files, only in those that were exported before"
        )
    })
}
