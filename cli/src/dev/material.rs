//! What the processes need on disk before they start: an authority, certificates, config files.

use std::collections::BTreeMap;
use std::fmt::Display;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use forebay_link::Authority;
use forebay_proto::{Level, Role};
use toml::{Table, Value};

use super::child::Plan;
use super::layout::Fleet;
use super::{EngineOptions, write_whole};
use crate::context::ContextFile;
use crate::exit::CliError;

/// What the balancers are told beyond their places.
pub(super) struct Balancers {
    pub(super) hold_headers_ms: u32,
    pub(super) receipts: u32,
}

/// Writes what is missing, and returns how to run each process.
pub(super) fn prepare(
    dir: &Path,
    fleet: &Fleet,
    listen: &[SocketAddr],
    engine: &EngineOptions,
    balancers: &Balancers,
) -> Result<Vec<Plan>, CliError> {
    let maker = Maker {
        dir,
        balancers,
        authority: authority(&dir.join("ca"))?,
        control: fleet.control_addresses(),
    };
    for part in ["config", "logs"] {
        make_dir(&dir.join(part))?;
    }
    let mut plans = vec![];
    for (n, node) in (1..).zip(&fleet.control) {
        plans.push(maker.control(&format!("c{n}"), node.quic, node.admin)?);
    }
    for (n, worker) in (1_usize..).zip(fleet.running_workers()) {
        let url = engine.urls.get(n - 1).map(String::as_str);
        if url.is_none() {
            plans.push(maker.engine(&format!("e{n}"), worker.engine, engine)?);
        }
        plans.push(maker.agent(&format!("w{n}"), worker, url, engine)?);
    }
    for ((n, balancer), http) in (1..).zip(&fleet.balancers).zip(listen) {
        plans.push(maker.balancer(&format!("b{n}"), *http, balancer.admin)?);
    }
    maker.context(&plans)?;
    Ok(plans)
}

struct Maker<'a> {
    balancers: &'a Balancers,
    dir: &'a Path,
    authority: Authority,
    control: Vec<String>,
}

impl Maker<'_> {
    fn control(&self, name: &str, quic: SocketAddr, admin: SocketAddr) -> Result<Plan, CliError> {
        let mut config = self.member(Role::Control, name)?;
        put(&mut config, "listen", &quic);
        put(&mut config, "admin", &admin);
        self.plan("control", name, &config, [("quic", quic), ("admin", admin)])
    }

    fn balancer(&self, name: &str, http: SocketAddr, admin: SocketAddr) -> Result<Plan, CliError> {
        let mut config = self.member(Role::Balancer, name)?;
        put(&mut config, "control", &self.control.join(","));
        put(&mut config, "listen", &http);
        put(&mut config, "admin", &admin);
        put(&mut config, "any-key-tenant", &"dev");
        config.insert("drain-timeout-ms".into(), DRAIN_MS.into());
        let Balancers {
            hold_headers_ms,
            receipts,
        } = *self.balancers;
        config.insert("hold-headers-ms".into(), hold_headers_ms.into());
        config.insert("receipts".into(), i64::from(receipts).into());
        self.plan(
            "balancer",
            name,
            &config,
            [("http", http), ("admin", admin)],
        )
    }

    fn agent(
        &self,
        name: &str,
        worker: &super::layout::Worker,
        url: Option<&str>,
        engine: &EngineOptions,
    ) -> Result<Plan, CliError> {
        let mut config = self.member(Role::Agent, name)?;
        put(&mut config, "name", &name);
        put(&mut config, "control", &self.control.join(","));
        put(&mut config, "listen", &worker.quic);
        put(&mut config, "advertise", &worker.quic);
        put(&mut config, "admin", &worker.admin);
        config.insert("drain-timeout-ms".into(), DRAIN_MS.into());
        config.insert("engine-stall-ms".into(), engine.engine_stall_ms.into());
        let addresses = [("quic", worker.quic), ("admin", worker.admin)];
        if let Some(url) = url {
            put(&mut config, "engine", &url);
            return self.plan("agent", name, &config, addresses);
        }
        put(&mut config, "engine", &format!("http://{}", worker.engine));
        put(&mut config, "engine-kind", &"emulated");
        config.insert("slots".into(), engine.engine_slots.into());
        config.insert("max-context".into(), engine.engine_max_context.into());
        config.insert("kv-tokens".into(), kv_tokens(engine));
        put(&mut config, "profile", &engine.profile);
        config.insert("profile-speed".into(), engine.engine_speed.into());
        self.plan("agent", name, &config, addresses)
    }

    fn engine(
        &self,
        name: &str,
        http: SocketAddr,
        options: &EngineOptions,
    ) -> Result<Plan, CliError> {
        let mut config = Table::new();
        put(&mut config, "listen", &http);
        put(&mut config, "model", &options.model);
        for (key, value) in [
            ("slots", Value::from(options.engine_slots)),
            ("max-context", options.engine_max_context.into()),
            ("profile", options.profile.as_str().into()),
            ("kv-tokens", kv_tokens(options)),
            ("speed", options.engine_speed.into()),
        ] {
            config.insert(key.into(), value);
        }
        if options.engines_die_of_seed {
            config.insert("die-of-seed".into(), true.into());
        }
        if options.kv_events {
            let socket = |kind: &str| {
                let path = self.dir.join(format!("{name}.{kind}"));
                format!("ipc://{}", path.display())
            };
            put(&mut config, "kv-events", &socket("kv"));
            put(&mut config, "kv-replay", &socket("again"));
            config.insert("kv-buffer".into(), i64::from(options.kv_buffer).into());
        }
        self.plan("engine", name, &config, [("http", http)])
    }

    /// What every process of the cell has: a disk of its own and a certificate.
    fn member(&self, role: Role, name: &str) -> Result<Table, CliError> {
        let (cert, key) = self.certificate(role, name)?;
        let mut config = Table::new();
        put(&mut config, "data-dir", &self.dir.join(name).display());
        put(&mut config, "ca", &self.dir.join("ca/ca.pem").display());
        put(&mut config, "cert", &cert.display());
        put(&mut config, "key", &key.display());
        Ok(config)
    }

    fn plan<const N: usize>(
        &self,
        role: &'static str,
        name: &str,
        config: &Table,
        addresses: [(&'static str, SocketAddr); N],
    ) -> Result<Plan, CliError> {
        let file = self.dir.join("config").join(format!("{name}.toml"));
        let text = format!("# Written by `forebay dev` at every start.\n{config}");
        write_whole(&file, &text)?;
        Ok(Plan {
            role,
            name: name.into(),
            config: file,
            log: self.dir.join("logs").join(format!("{name}.log")),
            addresses: addresses.map(|(kind, at)| (kind, at.to_string())).into(),
        })
    }

    fn context(&self, plans: &[Plan]) -> Result<(), CliError> {
        let urls = |role: &str, kind: &str| {
            let of_role = plans.iter().filter(|plan| plan.role == role);
            let urls = of_role.filter_map(|plan| {
                let address = plan.addresses.get(kind)?;
                Some((plan.name.clone(), format!("http://{address}")))
            });
            urls.collect()
        };
        let (cert, key) = self.certificate(Role::Operator(Level::Admin), "admin")?;
        let context = ContextFile {
            control: self.control.clone(),
            ca: self.dir.join("ca/ca.pem"),
            cert,
            key,
            endpoints: urls("balancer", "http"),
            balancers: urls("balancer", "admin"),
            agents: urls("agent", "admin"),
            control_nodes: urls("control", "admin"),
        };
        let text = toml::to_string(&context).expect("a context is plain data");
        write_whole(&self.dir.join("context.toml"), &text)
    }

    /// Issues a certificate unless both of its files exist.
    fn certificate(&self, role: Role, name: &str) -> Result<(PathBuf, PathBuf), CliError> {
        let dir = self.dir.join("certs");
        let files = [
            dir.join(format!("{name}.pem")),
            dir.join(format!("{name}-key.pem")),
        ];
        if !files.iter().all(|file| file.exists()) {
            // A start that was cut off may have left one of the two.
            for file in &files {
                let _ = std::fs::remove_file(file);
            }
            self.authority.issue(role, name, DAYS)?.save(&dir)?;
        }
        let [cert, key] = files;
        Ok((cert, key))
    }
}

fn authority(dir: &Path) -> Result<Authority, CliError> {
    if dir.join("ca.pem").exists() {
        return Ok(Authority::load(dir)?);
    }
    // The certificate is written last: without it, nothing was issued from this key.
    let _ = std::fs::remove_file(dir.join("ca-key.pem"));
    let authority = Authority::create("dev", rand::random())?;
    authority.save(dir)?;
    Ok(authority)
}

fn make_dir(dir: &Path) -> Result<(), CliError> {
    std::fs::create_dir_all(dir).map_err(|error| CliError::File {
        path: dir.into(),
        error,
    })
}

fn put(table: &mut Table, key: &str, value: &dyn Display) {
    table.insert(key.into(), Value::String(value.to_string()));
}

/// Longer than anybody keeps a fleet of this kind.
const DAYS: u32 = 825;

/// Within the time that the supervisor gives a stop.
const DRAIN_MS: u32 = 2_000;

/// Addresses by what is spoken there.
pub(super) type Addresses = BTreeMap<&'static str, String>;

fn kv_tokens(options: &EngineOptions) -> Value {
    i64::try_from(options.engine_kv_tokens)
        .unwrap_or(i64::MAX)
        .into()
}
