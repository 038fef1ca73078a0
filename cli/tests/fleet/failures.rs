//! Killed for real: leaders, watched nodes, the whole control plane, agents; under real requests.

use std::collections::BTreeMap;
use std::process::{Child, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use forebay_control_client::ControlClient;
use forebay_link::{CredentialPaths, Credentials, Endpoint};
use forebay_proto::ClientId;
use forebay_proto::wire::fleet::{Desired, SetDesired, command::Action};
use serde_json::Value;

use crate::harness::{FAST_ENGINE, Fleet, forebay, get, metric, post, within};

/// The shipped trace, replayed against every balancer in the background.
pub struct Load {
    replay: Child,
}

impl Load {
    fn start(fleet: &Fleet, requests: u32, speed: u32) -> Self {
        let (requests, speed) = (requests.to_string(), speed.to_string());
        Self::of(fleet, &["--limit", &requests, "--speed", &speed])
    }

    /// A replay with these arguments.
    pub fn of(fleet: &Fleet, args: &[&str]) -> Self {
        let mut command = forebay();
        command.args(["replay", "--verify", "--output", "json"]);
        command.args(args);
        for balancer in fleet.of_role("balancer") {
            command.args([
                "--target",
                &format!("http://{}", balancer.addresses["http"]),
            ]);
        }
        let replay = command
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        Self { replay }
    }

    fn running(&mut self) -> bool {
        self.replay.try_wait().unwrap().is_none()
    }

    fn report(self) -> Value {
        let output = self.replay.wait_with_output().unwrap();
        serde_json::from_slice(&output.stdout)
            .unwrap_or_else(|_| panic!("{}", String::from_utf8_lossy(&output.stderr)))
    }

    pub fn without_errors(self) -> Value {
        let report = self.report();
        assert_eq!(report["errors"], 0, "{report}");
        report
    }
}

/// Writes as an operator does, but in this process, to take the time of each.
pub struct Writer {
    runtime: tokio::runtime::Runtime,
    client: ControlClient,
}

impl Writer {
    pub fn new(fleet: &Fleet) -> Self {
        let text = std::fs::read_to_string(fleet.data().join("context.toml")).unwrap();
        let context: toml::Table = text.parse().unwrap();
        let path = |key: &str| context[key].as_str().unwrap().into();
        let paths = CredentialPaths {
            ca: path("ca"),
            cert: path("cert"),
            key: path("key"),
        };
        let control = context["control"].as_array().unwrap();
        let control = control
            .iter()
            .map(|one| one.as_str().unwrap().to_owned())
            .collect();
        let runtime = tokio::runtime::Runtime::new().unwrap();
        let client = runtime.block_on(async {
            let endpoint = Endpoint::client(&Credentials::load(&paths).unwrap()).unwrap();
            ControlClient::new(endpoint, control, ClientId(rand::random()), rand::random())
        });
        Self { runtime, client }
    }

    /// One command through the log and the disks of a majority.
    fn write(&self) {
        self.set_desired("w1", Desired::Ready);
    }

    pub fn set_desired(&self, name: &str, desired: Desired) {
        let set = SetDesired {
            name: name.into(),
            desired: desired.into(),
            override_guard: true,
        };
        let action = Action::SetDesired(set);
        let proposed = self
            .client
            .propose(action, "a test", Duration::from_secs(10));
        self.runtime.block_on(proposed).unwrap();
    }
}

/// How long this machine lets a thread wait that only sleeps: a promise in milliseconds cannot be
/// measured while the machine itself stands still.
struct Stalls {
    worst_us: Arc<AtomicU64>,
}

impl Stalls {
    const TOO_LONG: Duration = Duration::from_millis(200);

    /// Watches until dropped.
    fn watch() -> Self {
        let worst_us = Arc::new(AtomicU64::new(0));
        let seen = Arc::downgrade(&worst_us);
        std::thread::spawn(move || {
            let nap = Duration::from_millis(5);
            while let Some(worst) = seen.upgrade() {
                let asleep = Instant::now();
                std::thread::sleep(nap);
                let late = asleep.elapsed().saturating_sub(nap).as_micros();
                worst.fetch_max(u64::try_from(late).unwrap(), Ordering::Relaxed);
            }
        });
        Self { worst_us }
    }

    /// The longest since the last call.
    fn take(&self) -> Duration {
        Duration::from_micros(self.worst_us.swap(0, Ordering::Relaxed))
    }
}

/// Fifty writes a second by five in the background: what an election held up is made up for. None may
/// fail.
struct Writing {
    done: Arc<AtomicU64>,
    began: Instant,
    over: Arc<AtomicBool>,
    threads: Vec<std::thread::JoinHandle<()>>,
}

impl Writing {
    /// Of each writer.
    const EVERY: Duration = Duration::from_millis(100);

    fn start(fleet: &Fleet) -> Self {
        let (done, began) = (Arc::new(AtomicU64::new(0)), Instant::now());
        let over = Arc::new(AtomicBool::new(false));
        let threads = (0..5).map(|_| {
            let (writer, count, over) = (Writer::new(fleet), done.clone(), over.clone());
            std::thread::spawn(move || {
                let mut next = began;
                while !over.load(Ordering::Relaxed) {
                    writer.write();
                    count.fetch_add(1, Ordering::Relaxed);
                    next += Self::EVERY;
                    std::thread::sleep(next.saturating_duration_since(Instant::now()));
                }
            })
        });
        Self {
            threads: threads.collect(),
            done,
            began,
            over,
        }
    }

    /// Ends it; returns writes a second.
    fn stop(self) -> f64 {
        self.over.store(true, Ordering::Relaxed);
        for thread in self.threads {
            thread.join().expect("no write failed");
        }
        self.done.load(Ordering::Relaxed) as f64 / self.began.elapsed().as_secs_f64()
    }
}

fn percentile(sorted: &[Duration], percent: usize) -> Duration {
    sorted[(sorted.len() - 1) * percent / 100]
}

#[test]
fn twenty_leaders_are_killed_and_no_request_notices() {
    let kills: usize = 20;
    let fleet = Fleet::start(&[&["--control", "3", "--balancers", "2"], &FAST_ENGINE[..]].concat());
    let writer = Writer::new(&fleet);
    writer.write();
    let mut load = Load::start(&fleet, 400, 2);
    let writing = Writing::start(&fleet);
    let stalls = Stalls::watch();
    let (mut back, mut stalled) = (Vec::new(), Vec::new());
    while back.len() < kills {
        let leader = fleet.wait_for_control(3);
        stalls.take();
        fleet.kill(&leader);
        let killed = Instant::now();
        writer.write();
        let took = killed.elapsed();
        let stall = stalls.take();
        if stall < Stalls::TOO_LONG {
            back.push(took);
        } else {
            stalled.push((took, stall));
            assert!(stalled.len() <= 5, "the machine stands still: {stalled:?}");
        }
        if std::env::var_os("FOREBAY_TEST_KEEP_LOGS").is_some() {
            let since = std::time::SystemTime::now()
                .duration_since(std::time::UNIX_EPOCH)
                .unwrap();
            eprintln!(
                "{leader} {:?} back at {:.3}",
                killed.elapsed(),
                since.as_secs_f64() % 1000.0
            );
        }
        fleet.start_again(&[&leader]);
    }
    // Then each node in turn, so that those which the balancers and agents watch are among them.
    for node in ["c1", "c2", "c3"] {
        fleet.wait_for_control(3);
        fleet.kill(node);
        std::thread::sleep(Duration::from_millis(300));
        fleet.start_again(&[node]);
    }
    assert!(load.running(), "the requests ended before the kills did");
    let rate = writing.stop();
    assert!(rate > 40.0, "{rate} writes a second");
    let report = load.without_errors();
    back.sort();
    let (p50, max) = (percentile(&back, 50), back[back.len() - 1]);
    eprintln!(
        "writes back after a leader's death: p50 {p50:?}, max {max:?}, {rate:.1} writes/s; {report}"
    );
    eprintln!("not counted, with how long the machine stood still: {stalled:?}");
    assert!(p50 < Duration::from_secs(1), "{back:?}");
    assert!(max < Duration::from_millis(1_500), "{back:?}");
}

/// Name, id, incarnation and desired state of each worker.
pub fn workers(fleet: &Fleet) -> BTreeMap<String, (Value, Value, Value)> {
    let json = fleet.json(&["workers"]);
    let workers = json["workers"].as_array().unwrap().iter();
    workers
        .map(|worker| {
            let name = worker["name"].as_str().unwrap().to_owned();
            (
                name,
                (
                    worker["id"].clone(),
                    worker["incarnation"].clone(),
                    worker["desired"].clone(),
                ),
            )
        })
        .collect()
}

fn ready(fleet: &Fleet, name: &str) {
    let admin = fleet.admin(name);
    let host = admin.strip_prefix("http://").unwrap().to_owned();
    within(Duration::from_secs(20), "ready again", || {
        std::net::TcpStream::connect(&host).ok()?;
        (get(&format!("{admin}/readyz")).0 == 200).then_some(())
    });
}

#[test]
fn requests_go_on_without_any_control_plane_even_over_restarts() {
    let fleet = Fleet::start(
        &[
            &["--control", "3", "--balancers", "2", "--workers", "3"],
            &FAST_ENGINE[..],
        ]
        .concat(),
    );
    fleet.wait_for_control(3);
    Writer::new(&fleet).set_desired("w3", Desired::Cordoned);
    let before = workers(&fleet);
    within(Duration::from_secs(5), "cordon in force", || {
        let json = fleet.json(&["workers"]);
        let w3 = json["workers"]
            .as_array()?
            .iter()
            .find(|worker| worker["name"] == "w3")?
            .clone();
        (w3["observed"] == "cordoned").then_some(())
    });

    for node in ["c1", "c2", "c3"] {
        fleet.kill(node);
    }
    let status = fleet.run(&["status"]);
    assert_eq!(
        status.status.code(),
        Some(7),
        "{}",
        String::from_utf8_lossy(&status.stderr)
    );
    let calm = Load::start(&fleet, 100, 10).without_errors();
    assert!(
        calm["workers"].get("w3").is_none(),
        "cordoned stays cordoned: {calm}"
    );

    fleet.kill("b2");
    fleet.kill("w1");
    fleet.start_again(&["b2", "w1"]);
    ready(&fleet, "b2");
    ready(&fleet, "w1");
    let restarted = within(Duration::from_secs(20), "both workers serve again", || {
        let report = Load::start(&fleet, 40, 10).without_errors();
        report["workers"].get("w1").is_some().then_some(report)
    });
    assert!(restarted["workers"].get("w3").is_none(), "{restarted}");

    fleet.start_again(&["c1", "c2", "c3"]);
    fleet.wait_for_control(3);
    let after = within(
        Duration::from_secs(20),
        "w1's new start is registered",
        || {
            let after = workers(&fleet);
            (after["w1"].1 != before["w1"].1).then_some(after)
        },
    );
    for name in ["w2", "w3"] {
        assert_eq!(after[name], before[name], "{name} kept everything");
    }
    let (start, restarted) = (
        before["w1"].1.as_str().unwrap(),
        after["w1"].1.as_str().unwrap(),
    );
    let grant = |incarnation: &str| incarnation.rsplit_once('.').unwrap().0.to_owned();
    assert_eq!(
        grant(start),
        grant(restarted),
        "the same grant, a later start"
    );
    assert_eq!(
        (&after["w1"].0, &after["w1"].2),
        (&before["w1"].0, &before["w1"].2)
    );
    Load::start(&fleet, 40, 10).without_errors();
}

#[test]
fn a_killed_agents_unstarted_requests_go_elsewhere_and_started_ones_end_typed() {
    let fleet = Fleet::start(&[
        "--workers",
        "2",
        // 1.1 s for each token.
        "--engine-speed",
        "0.02",
    ]);
    let (_, models) = get(&format!("{}/v1/models", fleet.url));
    let model = models
        .split(r#""id":""#)
        .nth(1)
        .unwrap()
        .split('"')
        .next()
        .unwrap()
        .to_owned();
    let url = format!("{}/v1/chat/completions", fleet.url);
    let ask = |tokens: u32, stream: bool| {
        let url = url.clone();
        let body = format!(
            r#"{{"model":"{model}","stream":{stream},"max_tokens":{tokens},"messages":[{{"role":"user","content":"x"}}]}}"#
        );
        std::thread::spawn(move || {
            let answer = post(&url, &body);
            (answer, Instant::now())
        })
    };
    let running = |name: &str| {
        let (_, page) = get(&format!("{}/debug/workers", fleet.admin("b1")));
        let page: Value = serde_json::from_str(&page).unwrap();
        let workers = page["workers"].as_array().unwrap().iter();
        let mut named = workers.filter(|worker| worker["name"] == name);
        named.next().and_then(|worker| worker["running"].as_u64())
    };
    // Streams that are under way when their worker dies; idle workers are drawn at random, so as many
    // as it takes until each has one.
    let mut started = Vec::new();
    let on_each = loop {
        assert!(started.len() < 12, "one worker gets all streams");
        started.push(ask(16, true));
        let (on_w1, on_w2) = within(Duration::from_secs(5), "the stream is under way", || {
            let (w1, w2) = (running("w1")?, running("w2")?);
            (w1 + w2 == started.len() as u64).then_some((w1, w2))
        });
        if on_w1 > 0 && on_w2 > 0 {
            break [on_w1, on_w2];
        }
    };
    std::thread::sleep(Duration::from_millis(2_500));
    // And eight that have not got a byte yet.
    let unstarted: Vec<_> = (0..8).map(|i| ask(4, i % 2 == 0)).collect();
    std::thread::sleep(Duration::from_millis(500));
    let killed = Instant::now();
    fleet.kill("w1");

    for request in unstarted {
        let ((status, answer), _) = request.join().unwrap();
        assert_eq!(status, 200, "{answer}");
        assert!(answer.contains("length"), "{answer}");
    }
    let ended: Vec<_> = started
        .into_iter()
        .map(|request| request.join().unwrap())
        .collect();
    let (whole, broken): (Vec<_>, Vec<_>) = ended
        .iter()
        .partition(|((_, answer), _)| answer.contains("[DONE]"));
    assert_eq!(
        [broken.len() as u64, whole.len() as u64],
        on_each,
        "the streams on the killed worker broke"
    );
    for ((status, answer), ended) in broken {
        assert_eq!(*status, 200);
        assert!(answer.contains(r#""code":"upstream_error""#), "{answer}");
        let noticed = ended.duration_since(killed);
        eprintln!("the broken stream ended {noticed:?} after the kill");
        assert!(noticed < Duration::from_secs(2), "{noticed:?}");
    }
    within(Duration::from_secs(2), "nothing booked", || {
        let (_, page) = get(&format!("{}/debug/bookings", fleet.admin("b1")));
        let page: Value = serde_json::from_str(&page).ok()?;
        (page["bookings"] == 0).then_some(())
    });
    assert!(metric(&fleet.admin("b1"), "forebay_balancer_inflight") < 0.5);

    // Its lease runs out: an alarm, which its return clears.
    let lost = |wanted: bool| {
        within(Duration::from_secs(20), "lost, or not any more", || {
            let json = fleet.json(&["workers"]);
            let w1 = json["workers"]
                .as_array()?
                .iter()
                .find(|worker| worker["name"] == "w1")?
                .clone();
            (w1["lost"] == wanted).then_some(())
        });
    };
    lost(true);
    fleet.start_again(&["w1"]);
    lost(false);
}
