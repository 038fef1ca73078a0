//! The command line as a whole; each verb declares its own options beside what it does.

use clap::{Parser, Subcommand};

use crate::dev::DevArgs;
use crate::roles;
use crate::verbs;

/// Schedules LLM requests over a fleet of inference engines.
#[derive(Debug, Parser)]
#[command(
    name = "forebay",
    version,
    propagate_version = true,
    max_term_width = 100,
    subcommand_required = true,
    arg_required_else_help = true,
    after_help = AFTER_HELP
)]
pub(crate) struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub(crate) verb: Verb,
}

const AFTER_HELP: &str = "\
Examples:
  forebay dev                         a whole fleet on this machine
  forebay replay --limit 200          a real trace through it
  forebay status                      what it is doing and what is wrong

Exit codes: 0 done, 1 failed, 2 usage, 3 timed out, 4 refused by a guard, 5 not found, 6 unauthorized, \
7 no quorum or unreachable, 8 conflict, 9 partial.

Results go to stdout, all else to stderr. Logs: FOREBAY_LOG=info,forebay_link=debug chooses lines, \
FOREBAY_LOG_FORMAT=json makes them JSON.";

/// The verbs.
#[derive(Debug, Subcommand)]
pub(crate) enum Verb {
    /// Run a whole fleet on this machine, with emulated engines.
    Dev(DevArgs),
    /// Run a control node.
    Control(roles::control::ControlArgs),
    /// Run a balancer.
    Balancer(roles::balancer::BalancerArgs),
    /// Run a worker agent beside an engine.
    Agent(Box<roles::agent::AgentArgs>),
    /// Run an emulated engine.
    Engine(roles::engine::EngineArgs),
    /// Make a certificate authority, or issue certificates from it.
    Ca(verbs::ca::CaArgs),
    /// Prepare API keys for balancers.
    Keys(verbs::keys::KeysArgs),
    /// Found a cluster on control nodes that are empty; once.
    Init(verbs::init::InitArgs),
    /// Show the control nodes, each as it sees itself.
    Members(verbs::members::MembersArgs),
    /// Change the control plane's own members, hand over its leadership, back it up, time it.
    Raft(verbs::raft::RaftArgs),
    /// Show the workers that are registered.
    Workers(verbs::workers::WorkersArgs),
    /// Have workers take nothing new; what runs there goes on.
    Cordon(verbs::operate::CordonArgs),
    /// Have workers take requests again.
    Uncordon(verbs::operate::UncordonArgs),
    /// Take workers out of service: nothing new, what waits goes elsewhere, what runs is finished.
    Drain(Box<verbs::operate::DrainArgs>),
    /// Even out load: plan moves of what workers are to hold, and have them made.
    Rebalance(verbs::operate::RebalanceArgs),
    /// Show what many conversations share, and which workers are to hold it.
    Homes(verbs::operate::HomesArgs),
    /// Show requests that engines died of and that are refused, and let them through again.
    Quarantine(verbs::operate::QuarantineArgs),
    /// Show the fleet on one page, and what is wrong with it.
    Status(verbs::status::StatusArgs),
    /// Watch the fleet live in the terminal.
    Top(verbs::top::TopArgs),
    /// Look for whatever is wrong, and say what to do about it.
    Check(verbs::check::CheckArgs),
    /// Show why a request went to its worker, or where it would go.
    Explain(Box<verbs::explain::ExplainArgs>),
    /// Show who changed what, keep it, and check that nothing of it was changed.
    Audit(verbs::audit::AuditArgs),
    /// Show or replace the fleet's configuration document.
    Config(verbs::config::ConfigArgs),
    /// Send a real trace to an endpoint and measure what its users would see.
    Replay(verbs::replay::ReplayArgs),
    /// Send a real trace through a fresh fleet for each placement policy, and compare them.
    Compare(verbs::compare::CompareArgs),
    /// Run the fleet's parts in virtual time.
    Sim(verbs::sim::SimArgs),
    /// Print what a shell needs to complete our verbs and options.
    Completions(verbs::docs::CompletionsArgs),
    /// Pages of the documentation that follow from the code: manual pages.
    Docs(verbs::docs::DocsArgs),
}
