//! `forebay ca`: the cell's certificate authority, as files.

use std::path::PathBuf;

use clap::{Args, Subcommand};
use forebay_link::Authority;
use forebay_proto::Role;
use serde::Serialize;

use crate::exit::CliError;
use crate::output::OutputArgs;

/// Options of `forebay ca`.
#[derive(Debug, Args)]
pub(crate) struct CaArgs {
    #[command(subcommand)]
    verb: CaVerb,
}

#[derive(Debug, Subcommand)]
enum CaVerb {
    /// Make the authority of a new cell; once.
    Init(InitArgs),
    /// Issue a certificate for a process or an operator.
    Issue(IssueArgs),
}

#[derive(Debug, Args)]
#[command(after_help = "Example:\n  forebay ca init --cell prod --dir /etc/forebay/ca")]
struct InitArgs {
    /// Name of the cell; its trust domain is this name and eight random hex digits.
    #[arg(long, value_name = "NAME")]
    cell: String,
    /// Where to write ca.pem and ca-key.pem. Keep the key off the fleet's machines.
    #[arg(long, value_name = "DIR", default_value = "forebay-ca")]
    dir: PathBuf,
    #[command(flatten)]
    output: OutputArgs,
}

#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  forebay ca issue --role control --name c1 --out /etc/forebay\n  forebay ca issue --role operator/admin --name alice"
)]
struct IssueArgs {
    /// control, balancer, agent, operator/viewer, operator/operator or operator/admin.
    #[arg(long, value_parser = role)]
    role: Role,
    /// Who it is, unique in its role.
    #[arg(long)]
    name: String,
    /// Days until it expires, at most 825.
    #[arg(long, default_value_t = 365)]
    days: u32,
    /// Where `forebay ca init` wrote the authority.
    #[arg(long, value_name = "DIR", default_value = "forebay-ca")]
    dir: PathBuf,
    /// Where to write NAME.pem and NAME-key.pem; default: the authority's directory.
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    #[command(flatten)]
    output: OutputArgs,
}

fn role(text: &str) -> Result<Role, String> {
    text.parse()
        .map_err(|error: forebay_proto::identity::IdentityError| error.to_string())
}

#[derive(Serialize)]
struct Made {
    schema_version: u32,
    trust_domain: String,
    files: Vec<PathBuf>,
}

#[derive(Serialize)]
struct IssuedFiles {
    schema_version: u32,
    identity: String,
    days: u32,
    ca: PathBuf,
    cert: PathBuf,
    key: PathBuf,
}

/// Runs `forebay ca`.
pub(crate) fn run(args: CaArgs) -> Result<(), CliError> {
    match args.verb {
        CaVerb::Init(args) => init(&args),
        CaVerb::Issue(args) => issue(args),
    }
}

fn init(args: &InitArgs) -> Result<(), CliError> {
    let authority = Authority::create(&args.cell, rand::random())?;
    authority.save(&args.dir)?;
    let made = Made {
        schema_version: 1,
        trust_domain: authority.trust_domain().into(),
        files: vec![args.dir.join("ca.pem"), args.dir.join("ca-key.pem")],
    };
    args.output.print(&made, || {
        let files: Vec<String> = made.files.iter().map(|f| f.display().to_string()).collect();
        format!("trust domain {}\n{}", made.trust_domain, files.join("\n"))
    });
    Ok(())
}

fn issue(args: IssueArgs) -> Result<(), CliError> {
    let authority = Authority::load(&args.dir)?;
    let issued = authority.issue(args.role, &args.name, args.days)?;
    let out = args.out.unwrap_or_else(|| args.dir.clone());
    let (cert, key) = issued.save(&out)?;
    let files = IssuedFiles {
        schema_version: 1,
        identity: issued.identity.to_string(),
        days: args.days,
        ca: args.dir.join("ca.pem"),
        cert,
        key,
    };
    args.output.print(&files, || {
        format!(
            "{}\n{}\n{}",
            files.identity,
            files.cert.display(),
            files.key.display()
        )
    });
    Ok(())
}
