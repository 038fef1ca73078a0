//! One binary `forebay`: it picks a role or a verb, and shows results.
//!
//! There is no logic of the fleet here. Roles are started in the foreground ([`roles`]), `dev`
//! supervises them as child processes ([`dev`]), and every other verb asks the control plane and
//! prints ([`verbs`]). Results go to stdout, everything else to stderr, and the exit code says what
//! became of it ([`exit::Exit`]).
#![allow(clippy::disallowed_methods)] // a rim: processes, clocks and terminals

mod args;
mod context;
mod dev;
mod exit;
mod http;
mod look;
mod output;
mod roles;
mod settings;
mod verbs;

use std::process::ExitCode;

use args::{Cli, Verb};
use exit::CliError;

/// A request takes a few hundred small allocations, many of them freed by another thread: a tenth of its CPU with the
/// system's allocator.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    forebay_admin::quiet_panics();
    match settings::parse(std::env::args_os().collect()) {
        Ok(cli) => finish(run(cli)),
        Err(settings::ParseError::Clap(error)) => {
            // Clap prints help to stdout and usage errors to stderr, and knows the exit code.
            let _ = error.print();
            ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(exit::Exit::Usage.code()))
        }
        Err(settings::ParseError::File(error)) => finish(Err(error.into())),
    }
}

fn finish(result: Result<(), CliError>) -> ExitCode {
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            output::say(&format!("error: {error}"));
            ExitCode::from(error.exit().code())
        }
    }
}

fn run(cli: Cli) -> Result<(), CliError> {
    match cli.verb {
        Verb::Dev(args) => dev::run(&args),
        Verb::Control(args) => roles::control::run(args),
        Verb::Balancer(args) => roles::balancer::run(args),
        Verb::Agent(args) => roles::agent::run(*args),
        Verb::Engine(args) => roles::engine::run(args),
        Verb::Ca(args) => verbs::ca::run(args),
        Verb::Keys(args) => verbs::keys::run(args),
        Verb::Init(args) => verbs::init::run(&args),
        Verb::Members(args) => verbs::members::run(&args),
        Verb::Raft(args) => verbs::raft::run(args),
        Verb::Workers(args) => verbs::workers::run(&args),
        Verb::Cordon(args) => verbs::operate::cordon(&args),
        Verb::Uncordon(args) => verbs::operate::uncordon(&args),
        Verb::Drain(args) => verbs::operate::drain(&args),
        Verb::Rebalance(args) => verbs::operate::rebalance(&args),
        Verb::Homes(args) => verbs::operate::homes(&args),
        Verb::Quarantine(args) => verbs::operate::quarantine(&args),
        Verb::Status(args) => verbs::status::run(&args),
        Verb::Check(args) => verbs::check::run(&args),
        Verb::Explain(args) => verbs::explain::run(&args),
        Verb::Audit(args) => verbs::audit::run(&args),
        Verb::Config(args) => verbs::config::run(args),
        Verb::Replay(args) => verbs::replay::run(args),
        Verb::Compare(args) => verbs::compare::run(&args),
        Verb::Sim(args) => verbs::sim::run(&args),
        Verb::Top(args) => verbs::top::run(&args),
        Verb::Completions(args) => {
            verbs::docs::completions(&args);
            Ok(())
        }
        Verb::Docs(args) => verbs::docs::run(&args),
    }
}
