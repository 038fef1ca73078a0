//! Faults put into a real fleet, and what `forebay check` says of each.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use forebay_control_client::ControlClient;
use forebay_link::{CredentialPaths, Credentials, Endpoint};
use forebay_proto::ClientId;
use forebay_proto::wire::fleet::command::Action;
use forebay_proto::wire::fleet::{Desired, SetDesired};
use rcgen::{CertificateParams, Issuer, KeyPair, SanType};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use crate::harness::{FAST_ENGINE, Fleet, forebay};

/// What a check of this context says, and how long it took.
struct Checked {
    report: Value,
    code: i32,
    took: Duration,
}

impl Checked {
    fn of(context: &Path) -> Self {
        let began = Instant::now();
        let output = forebay()
            .args(["check", "--output", "json", "--context"])
            .arg(context)
            .output()
            .unwrap();
        let report = serde_json::from_slice(&output.stdout)
            .unwrap_or_else(|error| panic!("{error}: {}", String::from_utf8_lossy(&output.stderr)));
        Self {
            report,
            code: output.status.code().unwrap(),
            took: began.elapsed(),
        }
    }

    /// Whether this check came out so, and names this.
    fn says(&self, id: &str, status: &str, what: &str) -> bool {
        let checks = self.report["checks"].as_array().unwrap();
        checks.iter().any(|check| {
            let hint = check["hint"].as_str().unwrap();
            check["id"] == id
                && check["status"] == status
                && check["what"].as_str().unwrap().contains(what)
                && !hint.is_empty()
        })
    }

    fn failures(&self) -> Vec<&Value> {
        let checks = self.report["checks"].as_array().unwrap().iter();
        checks
            .filter(|check| check["status"] != "ok" && check["status"] != "skipped")
            .collect()
    }
}

struct World {
    fleet: Fleet,
    /// Faults, and whether each was named in time.
    named: Vec<(&'static str, bool)>,
}

/// A fault has to be named within this.
const LIMIT: Duration = Duration::from_secs(10);

impl World {
    fn context(&self) -> PathBuf {
        self.fleet.data().join("context.toml")
    }

    /// The usual context with one thing replaced.
    fn altered(&self, from: &str, to: &str) -> PathBuf {
        let text = std::fs::read_to_string(self.context()).unwrap();
        assert!(text.contains(from), "{from} in {text}");
        let path = self.fleet.dir.path().join("altered.toml");
        std::fs::write(&path, text.replacen(from, to, 1)).unwrap();
        path
    }

    /// Looks until the fault is named or the time is over; each look itself ends within ten seconds.
    fn expect(&mut self, fault: &'static str, context: &Path, id: &str, status: &str, what: &str) {
        let began = Instant::now();
        loop {
            let checked = Checked::of(context);
            assert!(
                checked.took < LIMIT,
                "{fault}: a check took {:?}",
                checked.took
            );
            assert_eq!(checked.code, i32::from(checked.report["failed"] != 0));
            let named = checked.says(id, status, what);
            if named || began.elapsed() > LIMIT {
                let took = began.elapsed();
                eprintln!(
                    "{fault}: {} after {took:.1?}",
                    if named { "named" } else { "NOT NAMED" }
                );
                if !named {
                    eprintln!("{:#?}", checked.failures());
                }
                self.named.push((fault, named));
                return;
            }
        }
    }

    /// Waits until nothing fails any more.
    fn whole(&self, why: &str) {
        let context = self.context();
        let mut last = None;
        let began = Instant::now();
        while began.elapsed() < Duration::from_secs(40) {
            let checked = Checked::of(&context);
            if checked.code == 0 {
                return;
            }
            last = Some(checked);
        }
        panic!("not whole after {why}: {:#?}", last.unwrap().failures());
    }

    fn signal(&self, name: &str, signal: Signal) {
        let pid = Pid::from_raw(self.fleet.process(name).pid).unwrap();
        kill_process(pid, signal).unwrap();
    }

    /// Issues an operator's certificate that ended yesterday.
    fn expired(&self) -> (PathBuf, PathBuf) {
        let ca = self.fleet.data().join("ca");
        let read = |name: &str| std::fs::read_to_string(ca.join(name)).unwrap();
        let key = KeyPair::from_pem(&read("ca-key.pem")).unwrap();
        let issuer = Issuer::from_ca_cert_pem(&read("ca.pem"), key).unwrap();
        let ours = self.credentials();
        let mut params = CertificateParams::default();
        let uri = ours.identity().to_string();
        params.subject_alt_names = vec![SanType::URI(uri.try_into().unwrap())];
        params.not_before = rcgen::date_time_ymd(2020, 1, 1);
        params.not_after = rcgen::date_time_ymd(2021, 1, 1);
        let key = KeyPair::generate().unwrap();
        let dir = self.fleet.dir.path();
        let (cert_file, key_file) = (dir.join("old.pem"), dir.join("old-key.pem"));
        let cert = params.signed_by(&key, &issuer).unwrap().pem();
        std::fs::write(&cert_file, cert).unwrap();
        std::fs::write(&key_file, key.serialize_pem()).unwrap();
        (cert_file, key_file)
    }

    fn credentials(&self) -> Credentials {
        let data = self.fleet.data();
        let paths = CredentialPaths {
            ca: data.join("ca/ca.pem"),
            cert: data.join("certs/admin.pem"),
            key: data.join("certs/admin-key.pem"),
        };
        Credentials::load(&paths).unwrap()
    }

    fn set(&self, worker: &str, desired: Desired) {
        let control = self.fleet.of_role("control").into_iter();
        let control = control.map(|node| node.addresses["quic"].clone()).collect();
        let credentials = self.credentials();
        let set = async {
            let endpoint = Endpoint::client(&credentials).unwrap();
            let client = ControlClient::new(endpoint, control, ClientId(rand::random()), 1);
            let action = Action::SetDesired(SetDesired {
                name: worker.into(),
                desired: desired.into(),
                override_guard: true,
            });
            client.propose(action, "a fault", LIMIT).await.unwrap();
        };
        tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap()
            .block_on(set);
    }
}

#[test]
fn faults_of_every_kind_are_named_within_ten_seconds() {
    let args = ["--control", "3", "--balancers", "2", "--workers", "2"];
    let fleet = Fleet::start(&[&args[..], &FAST_ENGINE].concat());
    let leader = fleet.wait_for_control(3);
    let follower = ["c1", "c2", "c3"]
        .into_iter()
        .find(|name| *name != leader)
        .unwrap();
    let mut world = World {
        fleet,
        named: vec![],
    };
    world.whole("the start");
    let context = world.context();
    let checked = Checked::of(&context);
    let count = checked.report["checks"].as_array().unwrap().len();
    eprintln!("{count} checks of a whole fleet in {:.1?}", checked.took);
    assert!(count >= 25 && checked.report["ok"] == true && checked.report["warned"] == 0);

    // Of the context, with the fleet whole.
    let nowhere = world.altered("control = [\"", "control = [\"127.0.0.1:9\", \"");
    world.expect(
        "a wrong address",
        &nowhere,
        "control.reachable",
        "fail",
        "127.0.0.1:9",
    );
    let dir = world.fleet.dir.path().to_owned();
    let made = forebay()
        .args(["ca", "init", "--cell", "other", "--dir"])
        .arg(dir.join("other"))
        .output()
        .unwrap();
    assert!(made.status.success());
    let data = world.fleet.data();
    let (ca, other) = (data.join("ca/ca.pem"), dir.join("other/ca.pem"));
    let wrong_ca = world.altered(ca.to_str().unwrap(), other.to_str().unwrap());
    world.expect(
        "a wrong CA",
        &wrong_ca,
        "certificate.files",
        "fail",
        "other.",
    );
    let (old, old_key) = world.expired();
    let admin = data.join("certs/admin.pem");
    let text = std::fs::read_to_string(&context).unwrap();
    let text = text.replace(admin.to_str().unwrap(), old.to_str().unwrap());
    let admin_key = data.join("certs/admin-key.pem");
    let text = text.replace(admin_key.to_str().unwrap(), old_key.to_str().unwrap());
    let expired = dir.join("expired.toml");
    std::fs::write(&expired, text).unwrap();
    world.expect(
        "an expired certificate",
        &expired,
        "certificate.dates",
        "fail",
        "expired",
    );
    let agents = std::fs::read_to_string(&context).unwrap();
    let agents = agents
        .replace("admin.pem", "w1.pem")
        .replace("admin-key.pem", "w1-key.pem");
    let role = dir.join("role.toml");
    std::fs::write(&role, agents).unwrap();
    world.expect(
        "a wrong role",
        &role,
        "certificate.role",
        "fail",
        "agent/w1",
    );

    // Of workers.
    world.fleet.kill("e1");
    world.expect(
        "a stopped engine",
        &context,
        "workers.engines",
        "fail",
        "w1",
    );
    world.fleet.start_again(&["e1"]);
    world.whole("the engine's return");
    world.signal("w1", Signal::STOP);
    world.expect("a frozen agent", &context, "agents.reachable", "fail", "w1");
    world.signal("w1", Signal::CONT);
    world.whole("the agent's return");
    world.fleet.kill("w2");
    world.expect("a dead agent", &context, "agents.reachable", "fail", "w2");
    world.fleet.start_again(&["w2"]);
    world.whole("the agent's restart");
    world.set("w1", Desired::Cordoned);
    world.set("w2", Desired::Cordoned);
    world.expect(
        "the last worker cordoned",
        &context,
        "models.ready",
        "fail",
        "emulated",
    );
    world.set("w1", Desired::Ready);
    world.set("w2", Desired::Ready);
    world.whole("the cordons");

    // Of balancers.
    world.fleet.kill("b2");
    world.expect(
        "a dead balancer",
        &context,
        "balancers.reachable",
        "fail",
        "b2",
    );
    world.fleet.start_again(&["b2"]);
    world.whole("the balancer's return");
    world.signal("b1", Signal::STOP);
    world.expect(
        "a frozen balancer",
        &context,
        "endpoints.answer",
        "fail",
        "b1",
    );
    world.signal("b1", Signal::CONT);
    world.whole("the balancer's thaw");

    // Of the control plane.
    world.fleet.kill(follower);
    world.expect(
        "a dead node",
        &context,
        "control.reachable",
        "fail",
        follower,
    );
    let disk = data.join(follower);
    std::fs::rename(&disk, dir.join("taken")).unwrap();
    world.fleet.start_again(&[follower]);
    world.expect(
        "a lost disk",
        &context,
        "control.taking-part",
        "fail",
        "lost its disk",
    );
    world.fleet.kill(follower);
    std::fs::remove_dir_all(&disk).unwrap();
    std::fs::rename(dir.join("taken"), &disk).unwrap();
    world.fleet.start_again(&[follower]);
    world.whole("the disk's return");
    let leader = world.fleet.wait_for_control(3);
    world.fleet.kill(&leader);
    world.expect(
        "a dead leader",
        &context,
        "control.reachable",
        "fail",
        &leader,
    );
    let left = ["c1", "c2", "c3"]
        .into_iter()
        .find(|name| *name != leader)
        .unwrap();
    world.fleet.kill(left);
    world.expect(
        "no quorum",
        &context,
        "control.quorum",
        "fail",
        "no control node leads",
    );

    let missed: Vec<_> = world.named.iter().filter(|(_, named)| !named).collect();
    assert_eq!(world.named.len(), 14);
    assert!(missed.len() <= 1, "{missed:?}");
}
