//! `forebay init`: founds a cluster, once, on nodes that all answer and are all empty.

use clap::Args;
use forebay_proto::ClusterId;
use forebay_proto::fleet::Member;
use serde::Serialize;

use super::ask::Asked;
use crate::context::ContextArgs;
use crate::exit::CliError;
use crate::output::{OutputArgs, table};

/// Options of `forebay init`.
#[derive(Debug, Args)]
#[command(
    after_help = "Example:\n  forebay init --control c1:7400,c2:7400,c3:7400 --ca ca.pem --cert alice.pem --key alice-key.pem\n\nThe certificate needs the role operator/admin. An init that was interrupted is finished by the same command."
)]
pub(crate) struct InitArgs {
    #[command(flatten)]
    output: OutputArgs,
    #[command(flatten)]
    context: ContextArgs,
}

#[derive(Serialize)]
struct Founded {
    schema_version: u32,
    cluster_id: ClusterId,
    members: Vec<Member>,
}

/// Runs `forebay init`.
pub(crate) fn run(args: &InitArgs) -> Result<(), CliError> {
    let context = args.context.resolve()?;
    crate::roles::thread()?.block_on(async {
        let asked = Asked::new(context)?;
        let drawn = ClusterId(rand::random());
        let founded = asked.client.init(drawn, asked.timeout).await?;
        let founded = Founded {
            schema_version: 1,
            cluster_id: founded.cluster_id,
            members: founded.members,
        };
        args.output.print(&founded, || page(&founded));
        Ok(())
    })
}

fn page(founded: &Founded) -> String {
    let rows = founded.members.iter().map(|member| {
        [
            member.id.to_string(),
            member.name.clone(),
            member.address.clone(),
            member.store_id.to_string(),
        ]
    });
    format!(
        "cluster {}\n\n{}",
        founded.cluster_id,
        table(["ID", "NAME", "ADDRESS", "STORE"], rows)
    )
}
