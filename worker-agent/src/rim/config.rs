//! What an agent is started with.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use forebay_link::{CredentialPaths, Credentials};
use forebay_proto::Role;
use forebay_proto::fleet::{WorkerSpec, check_address};
use forebay_scheduler::fingerprint::{RENDER_PROFILE, RenderProfile};
use forebay_scheduler::model::{PROFILES, Profile};

use super::engine::EngineAddress;
use super::follow::{self, EventsAt, KvEvents, TokensOf};
use super::found::EngineFacts;
use super::lifecycle::Running;
use super::sources::{LocalEndpoint, Sources};
use super::work::{Manner, Patience};
use crate::adapter::Adapter;
use crate::core::Settings;
use crate::error::AgentError;

/// Bytes of request bodies that are held at once.
const BODY_BUDGET_BYTES: u64 = 256 << 20;
const MAX_SLOTS: u32 = 65_536;
/// Where nobody says how many.
const SLOTS: u32 = 64;
/// An engine that prefills a long prompt says nothing for seconds.
const LEAST_STALL_MS: u64 = 1_000;
/// The `--engine-kind` that is none.
const AUTO: &str = "auto";

/// What an agent is started with; the command line declares the options.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    /// The worker's name; the certificate's when absent, and it must be the certificate's.
    pub name: Option<String>,
    /// Where balancers connect (UDP).
    pub listen: SocketAddr,
    /// `host:port` under which balancers reach it; the listening address when absent.
    pub advertise: Option<String>,
    /// Where health and metrics are served; nowhere when absent.
    pub admin: Option<SocketAddr>,
    /// The engine: `http://host:port`.
    pub engine_url: String,
    /// Kind of engine, such as `vllm`; `auto`: found by asking it.
    pub engine_kind: String,
    /// Whose requests the engine gets; `*`: everybody's. Absent: everybody's, or the first tenant's where the
    /// engine keeps no caches apart.
    pub tenant: Option<String>,
    /// The engine is told when each first token is due.
    pub engine_priority: bool,
    /// Runs the engine, by a shell; it is there already when absent.
    pub engine_command: Option<String>,
    /// How long an engine that is started may take until it answers.
    pub engine_start_ms: u64,
    /// How long an engine with requests may make no progress.
    pub engine_stall_ms: u64,
    /// Where the engine publishes its cache's events: a socket of this host, `auto` or `off`.
    pub kv_events: String,
    /// Where it tells them again.
    pub kv_replay: Option<String>,
    /// The model's `tokenizer.json`, or its directory.
    pub tokenizer: Option<PathBuf>,
    /// The pool it belongs to.
    pub pool: String,
    /// Requests that run on the engine at once.
    ///
    /// Absent: 64, or as many as the engine says it runs, if that is fewer.
    pub slots: Option<u32>,
    /// Requests that wait beyond them; as many as slots when absent.
    pub queue_limit: Option<u32>,
    /// Longest context it takes; 0: as the engine says.
    pub max_context_tokens: u32,
    /// Tokens its KV cache holds; 0: as the engine says.
    pub kv_tokens: u64,
    /// The latency profile that comes nearest to the engine; not known when absent.
    pub profile: Option<String>,
    /// Divides the profile's times.
    pub profile_speed: f64,
    /// Where it stands; empty when not told.
    pub zone: String,
    /// Free labels.
    pub labels: BTreeMap<String, String>,
    /// Type of its GPUs; empty when not told.
    pub gpu_type: String,
    /// Number of its GPUs.
    pub gpu_count: u32,
    /// Revision of the model's weights; empty when not told.
    pub revision: String,
    /// Control nodes; any one that is up suffices.
    pub control: Vec<String>,
    /// Where the incarnation and the last facts are kept.
    pub data_dir: PathBuf,
    /// Certificate, key and CA.
    pub credentials: CredentialPaths,
    /// Take the name from a process that is known to be gone.
    pub takeover: bool,
    /// How long a stop waits for running requests.
    pub drain_timeout_ms: u64,
}

/// A configuration that was checked, before anything is opened.
pub(super) struct Checked {
    pub(super) name: String,
    pub(super) credentials: Credentials,
    pub(super) engine: EngineAddress,
    pub(super) manner: Manner,
    pub(super) process: Option<Running>,
    pub(super) patience: Patience,
    pub(super) settings: Settings,
    pub(super) drain_timeout: Duration,
    pub(super) kv_events: KvEvents,
}

impl Config {
    /// Checks all that can be checked without the network.
    pub(super) fn check(&self) -> Result<Checked, AgentError> {
        let engine = self.engine_url.parse()?;
        let slots = self.slots.unwrap_or(SLOTS);
        if !(1..=MAX_SLOTS).contains(&slots) {
            let problem = format!("is {slots}, must be 1 to {MAX_SLOTS}");
            return Err(option("--slots", problem));
        }
        let queue_limit = self.queue_limit.unwrap_or(slots);
        if queue_limit > MAX_SLOTS {
            let problem = format!("is {queue_limit}, must be at most {MAX_SLOTS}");
            return Err(option("--queue-limit", problem));
        }
        if self.control.is_empty() {
            let problem = "is empty: name at least one control node as host:port".to_owned();
            return Err(option("--control", problem));
        }
        for address in &self.control {
            check_address(address).map_err(|problem| option("--control", problem))?;
        }
        let kind = self.kind()?;
        if self.engine_stall_ms < LEAST_STALL_MS {
            let problem = format!(
                "is {}, must be at least {LEAST_STALL_MS}",
                self.engine_stall_ms
            );
            return Err(option("--engine-stall-ms", problem));
        }
        let profile = self.profile()?;
        let render = self.render_profile()?;
        let kv_events = self.kv_events()?;
        let credentials = Credentials::load(&self.credentials)?;
        let identity = credentials.identity();
        let name = self.name.clone().unwrap_or_else(|| identity.name.clone());
        if identity.role != Role::Agent || identity.name != name {
            return Err(AgentError::Identity {
                cert: self.credentials.cert.clone(),
                found: identity.short(),
                expected: format!("agent/{name}"),
            });
        }
        Ok(Checked {
            name,
            credentials,
            engine,
            manner: Manner {
                kind,
                tenant: self.tenant.clone(),
                priority: self.engine_priority,
                asks_size: self.kv_tokens == 0,
                asks_slots: self.slots.is_none(),
                render,
            },
            process: self.engine_command.clone().map(|command| Running {
                command,
                start: Duration::from_millis(self.engine_start_ms),
                silence: Duration::from_millis(self.engine_stall_ms),
            }),
            patience: Patience {
                stall: Duration::from_millis(self.engine_stall_ms),
                ..Patience::default()
            },
            settings: Settings {
                at_once: false,
                slots,
                queue_limit,
                body_budget_bytes: BODY_BUDGET_BYTES,
                kv_tokens: self.kv_tokens,
                profile,
            },
            drain_timeout: Duration::from_millis(self.drain_timeout_ms),
            kv_events,
        })
    }

    /// The kind that was named; none: the engine is asked.
    fn kind(&self) -> Result<Option<String>, AgentError> {
        match self.engine_kind.as_str() {
            AUTO => Ok(None),
            kind if Adapter::named(kind).is_some() => Ok(Some(kind.to_owned())),
            kind => {
                let kinds = Adapter::kinds().join(", ");
                let problem = format!("is {kind:?}, must be {AUTO} or one of {kinds}");
                Err(option("--engine-kind", problem))
            }
        }
    }

    /// How the engine's template renders prompts, where that is said.
    fn render_profile(&self) -> Result<Option<RenderProfile>, AgentError> {
        let Some(id) = self.labels.get(RENDER_PROFILE) else {
            return Ok(None);
        };
        if let Some(profile) = RenderProfile::named(id) {
            return Ok(Some(profile));
        }
        let problem = format!(
            "{RENDER_PROFILE} is not tools_first, system_tools, tools_first_user or tools_last_user, with any of \
             +hoisted +lines +developer +reasoning +no_reasoning +names"
        );
        Err(option("--label", problem))
    }

    /// Whether the engine's events of its cache are followed.
    fn kv_events(&self) -> Result<KvEvents, AgentError> {
        let endpoint = |name, text: &str| {
            let parsed = text.parse::<LocalEndpoint>();
            parsed.map_err(|problem| option(name, problem.to_string()))
        };
        let replay = self.kv_replay.as_deref();
        let replay = replay.map(|replay| endpoint("--kv-replay", replay));
        let replay = replay.transpose()?;
        // One that is found out later may be a vLLM.
        let kind = self.kind()?;
        let adapter = kind.as_deref().map(Adapter::named);
        let follows = adapter.is_none_or(|adapter| adapter == Some(Adapter::Vllm));
        let at = match self.kv_events.as_str() {
            "auto" if follows => EventsAt::Discovered,
            "auto" | "off" => EventsAt::Nowhere,
            _ if !follows => {
                let problem = format!("is of no use with --engine-kind {}", self.engine_kind);
                return Err(option("--kv-events", problem));
            }
            given => EventsAt::Given(Sources {
                events: endpoint("--kv-events", given)?,
                replay: replay.clone(),
            }),
        };
        if replay.is_some() && !matches!(at, EventsAt::Given(_)) {
            let problem = "is given without the socket of the events, by --kv-events".to_owned();
            return Err(option("--kv-replay", problem));
        }
        let tokens = match &self.tokenizer {
            Some(path) => {
                // Here, so that it is not found out when the engine answers.
                follow::read(path).map_err(|problem| option("--tokenizer", problem))?;
                TokensOf::File(path.clone())
            }
            None => TokensOf::Engine,
        };
        Ok(KvEvents { at, tokens })
    }

    /// How fast the engine is said to be.
    fn profile(&self) -> Result<Option<Profile>, AgentError> {
        let Some(name) = &self.profile else {
            return Ok(None);
        };
        let speed = self.profile_speed;
        if !(speed.is_finite() && speed > 0.0) {
            let problem = format!("is {speed}, must be greater than 0");
            return Err(option("--profile-speed", problem));
        }
        let Some(profile) = Profile::named(name) else {
            let names = PROFILES.map(|(name, _)| name).join(", ");
            return Err(option(
                "--profile",
                format!("is {name:?}, must be one of {names}"),
            ));
        };
        Ok(Some(profile.at_speed(speed)))
    }

    /// `host:port` for balancers.
    pub(super) fn advertised(&self, bound: SocketAddr) -> Result<String, AgentError> {
        match &self.advertise {
            Some(address) => {
                check_address(address).map_err(|problem| option("--advertise", problem))?;
                Ok(address.clone())
            }
            None if bound.ip().is_unspecified() => Err(option(
                "--advertise",
                format!(
                    "is needed to listen on {bound}: give host:port by which balancers reach this worker"
                ),
            )),
            None => Ok(bound.to_string()),
        }
    }

    /// What is declared to the fleet.
    pub(super) fn spec(
        &self,
        advertise: &str,
        models: &[String],
        engine: &EngineFacts,
    ) -> Result<WorkerSpec, AgentError> {
        let told = |said: u32| (said > 0).then_some(said);
        let mut labels = self.labels.clone();
        if let Some(render) = engine.render {
            // What an operator said counts.
            labels
                .entry(RENDER_PROFILE.into())
                .or_insert_with(|| render.id());
        }
        let spec = WorkerSpec {
            pool: self.pool.clone(),
            advertise: advertise.to_owned(),
            engine: engine.kind.clone(),
            models: models.to_vec(),
            revision: self.revision.clone(),
            gpu_type: self.gpu_type.clone(),
            gpu_count: self.gpu_count,
            kv_tokens: match self.kv_tokens {
                0 => engine.kv_tokens.unwrap_or(0),
                told => told,
            },
            max_context_tokens: told(self.max_context_tokens)
                .or(engine.max_context_tokens)
                .unwrap_or(0),
            adapters: Vec::new(),
            zone: self.zone.clone(),
            labels,
            slots: self
                .slots
                .unwrap_or(engine.slots.unwrap_or(SLOTS).min(SLOTS)),
        };
        WorkerSpec::from_wire(&spec.to_wire())
            .map_err(|error| option("the worker's description", error.to_string()))
    }
}

fn option(option: &'static str, problem: String) -> AgentError {
    AgentError::Option { option, problem }
}
