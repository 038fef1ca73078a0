//! Workers leave while they are busy, and whoever was to see to it dies.

use std::io::{BufRead as _, BufReader, Write as _};
use std::net::TcpStream;
use std::process::{Child, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

use crate::harness::{Fleet, forebay, metric, within};

const STREAMS: usize = 300;
/// A fifth of real time: an answer takes some seconds, and the machine has time for hundreds of them.
const SLOW: [&str; 2] = ["--engine-speed", "0.2"];

/// What became of one request.
#[derive(Clone, Debug)]
pub(super) struct Told {
    asked: Instant,
    balancer: usize,
    worker: String,
    first_token: Option<Duration>,
    ended: Instant,
    /// Why it failed; `None`: it ended in `[DONE]`.
    failed: Option<String>,
}

/// Clients that have a stream open at all times.
pub(super) struct Streams {
    stop: Arc<AtomicBool>,
    told: Arc<Mutex<Vec<Told>>>,
    threads: Vec<std::thread::JoinHandle<()>>,
}

impl Streams {
    /// `count` clients, spread over these balancers; who loses its own goes to the first.
    pub(super) fn start(fleet: &Fleet, count: usize, tokens: (u32, u32)) -> Self {
        let balancers: Vec<String> = fleet
            .of_role("balancer")
            .iter()
            .map(|balancer| balancer.addresses["http"].clone())
            .collect();
        let stop = Arc::new(AtomicBool::new(false));
        let told: Arc<Mutex<Vec<Told>>> = Arc::default();
        let client = |client: usize| {
            let (stop, told) = (Arc::clone(&stop), Arc::clone(&told));
            let balancers = balancers.clone();
            std::thread::spawn(move || {
                let mut balancer = client % balancers.len();
                let mut turn = 0;
                while !stop.load(Ordering::Relaxed) {
                    let tokens = tokens.0 + rand::random_range(0..=tokens.1 - tokens.0);
                    let prompt = format!("client {client} turn {turn}");
                    let one = ask(&balancers[balancer], balancer, &prompt, tokens);
                    turn += 1;
                    if one.failed.is_some() {
                        balancer = 0;
                        std::thread::sleep(Duration::from_millis(200));
                    }
                    told.lock().unwrap().push(one);
                }
            })
        };
        let threads = (0..count).map(client).collect();
        Self {
            stop,
            told,
            threads,
        }
    }

    /// Lets every stream come to its end.
    pub(super) fn end(mut self) -> Vec<Told> {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            thread.join().unwrap();
        }
        std::mem::take(&mut *self.told.lock().unwrap())
    }
}

impl Drop for Streams {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

fn ask(host: &str, balancer: usize, prompt: &str, tokens: u32) -> Told {
    let mut told = Told {
        asked: Instant::now(),
        balancer,
        worker: String::new(),
        first_token: None,
        ended: Instant::now(),
        failed: None,
    };
    told.failed = stream(host, prompt, tokens, &mut told).err();
    told.ended = Instant::now();
    told
}

fn stream(host: &str, prompt: &str, tokens: u32, told: &mut Told) -> Result<(), String> {
    let said = |error: std::io::Error| error.to_string();
    let body = format!(
        r#"{{"model":"emulated","stream":true,"max_tokens":{tokens},"messages":[{{"role":"user","content":"{prompt}"}}]}}"#
    );
    let mut stream = TcpStream::connect(host).map_err(said)?;
    stream
        .set_read_timeout(Some(Duration::from_secs(60)))
        .map_err(said)?;
    let head = format!(
        "POST /v1/chat/completions HTTP/1.1\r\nhost: {host}\r\nauthorization: Bearer any\r\n\
         content-type: application/json\r\ncontent-length: {}\r\nconnection: close\r\n\r\n",
        body.len()
    );
    stream.write_all((head + &body).as_bytes()).map_err(said)?;
    let mut lines = BufReader::new(stream).lines();
    let status = lines.next().ok_or("closed")?.map_err(said)?;
    let mut rest = String::new();
    for line in lines {
        let line = line.map_err(said)?;
        if let Some(worker) = line.strip_prefix("x-forebay-worker: ") {
            worker.clone_into(&mut told.worker);
        }
        if line.starts_with("data: {\"error\"") || !status.contains(" 200 ") {
            rest += &line;
        } else if line.starts_with("data: [DONE]") {
            return Ok(());
        } else if line.starts_with("data: ") && told.first_token.is_none() {
            told.first_token = Some(told.asked.elapsed());
        }
    }
    Err(format!("{status}: {rest}"))
}

fn p99(mut times: Vec<Duration>) -> Duration {
    times.sort();
    times[(times.len() * 99 / 100).min(times.len() - 1)]
}

/// Ctrl-C on an operator who follows the drain: it goes on.
fn left_alone(fleet: &Fleet) -> String {
    let watching = verb(fleet, &["drain", "watch", "w1"]);
    std::thread::sleep(Duration::from_secs(1));
    let pid = i32::try_from(watching.id()).unwrap();
    kill_process(Pid::from_raw(pid).unwrap(), Signal::INT).unwrap();
    let left = watching.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&left.stderr).into_owned();
    assert_eq!(left.status.code(), Some(3), "{said}");
    said
}

fn verb(fleet: &Fleet, args: &[&str]) -> Child {
    forebay()
        .args(args)
        .env("FOREBAY_CONTEXT", fleet.data().join("context.toml"))
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap()
}

#[test]
fn two_of_eight_busy_workers_leave_while_leader_operator_and_balancer_die_and_nobody_notices() {
    let mut args = vec!["--control", "3", "--balancers", "2", "--workers", "8"];
    args.extend(SLOW);
    let fleet = Fleet::start(&args);
    let leader = fleet.wait_for_control(3);
    let streams = Streams::start(&fleet, STREAMS, (60, 120));
    std::thread::sleep(Duration::from_secs(16));

    let drain = ["drain", "w1", "w2", "--yes", "--reason", "a test"];
    let mut operator = verb(&fleet, &drain);
    let began = Instant::now();
    within(Duration::from_secs(10), "the drain is in force", || {
        let drains = fleet.json(&["drain", "status"]);
        drains["drains"][0]["in_force_ms"].as_u64()
    });
    let in_force = Instant::now();
    std::thread::sleep(Duration::from_secs(1).saturating_sub(began.elapsed()));
    fleet.kill(&leader);
    let left = left_alone(&fleet);
    std::thread::sleep(Duration::from_millis(300));
    let running = operator.try_wait().unwrap().is_none();
    operator.kill().unwrap();
    operator.wait().unwrap();
    // What the drain alone does to those who begin meanwhile.
    std::thread::sleep(Duration::from_secs(4));
    let killed = Instant::now();
    fleet.kill("b2");

    let watched = fleet.run(&["drain", "watch", "w1", "--output", "json"]);
    let stderr = String::from_utf8_lossy(&watched.stderr).into_owned();
    assert_eq!(watched.status.code(), Some(0), "{stderr}");
    let drained: serde_json::Value = serde_json::from_slice(&watched.stdout).unwrap();
    let over = Instant::now();
    std::thread::sleep(Duration::from_secs(2));
    let told = streams.end();

    assert_eq!(drained["schema_version"], 1);
    assert_eq!(drained["state"], "drained", "{drained}");
    let in_force_ms = drained["in_force_ms"].as_u64().unwrap();
    let failed: Vec<&Told> = told.iter().filter(|one| one.failed.is_some()).collect();
    let (b2, others): (Vec<&Told>, Vec<&Told>) = failed.iter().partition(|one| one.balancer == 1);
    let first = |from: Instant, to: Instant| {
        let there = told
            .iter()
            .filter(|one| one.asked >= from && one.asked < to);
        there.filter_map(|one| one.first_token).collect::<Vec<_>>()
    };
    let warm = began.checked_sub(Duration::from_secs(12)).unwrap();
    let (before, during) = (first(warm, began), first(began, killed));
    let after = first(killed, over);
    eprintln!(
        "drain of 2 of 8 under {STREAMS} streams: {} requests, in force after {in_force_ms} ms, drained after {} ms \
         (the operator was still watching when it was killed: {running}); {} of balancer b2's streams cut, {} others \
         failed; first token p99 {:?} before ({}), {:?} during ({}), {:?} after the balancer died and its clients came over ({})",
        told.len(),
        drained["drained_ms"],
        b2.len(),
        others.len(),
        p99(before.clone()),
        before.len(),
        p99(during.clone()),
        during.len(),
        p99(after.clone()),
        after.len(),
    );
    assert!(others.is_empty(), "{others:?}");
    for one in &b2 {
        assert!(one.ended >= killed, "before its balancer died: {one:?}");
    }
    assert!(left.contains("goes on without this command"), "{left}");
    assert!(in_force_ms < 1_000, "{drained}");
    let late: Vec<&Told> = told
        .iter()
        .filter(|one| one.asked > in_force && ["w1", "w2"].contains(&one.worker.as_str()))
        .collect();
    assert!(late.is_empty(), "started on a drained worker: {late:?}");
    let on_drained = told.iter().filter(|one| one.worker == "w1").count();
    assert!(on_drained > 0, "it was busy before");
    let slack = p99(before).mul_f64(1.3) + Duration::from_secs(3);
    assert!(p99(during) <= slack, "first tokens suffered");
}

#[test]
fn of_two_operators_who_take_the_last_two_workers_exactly_one_is_refused_with_the_numbers() {
    let fleet = Fleet::start(&["--workers", "2", "--engine-speed", "10"]);
    let [first, second] = ["w1", "w2"].map(|name| verb(&fleet, &["drain", name, "--yes"]));
    let ended = [first, second].map(|one| one.wait_with_output().unwrap());
    let mut codes = ended.clone().map(|one| one.status.code().unwrap());
    codes.sort_unstable();
    assert_eq!(codes, [0, 4], "{ended:?}");
    let refused = ended
        .iter()
        .find(|one| one.status.code() == Some(4))
        .unwrap();
    let said = String::from_utf8_lossy(&refused.stderr);
    for part in [
        "model emulated of pool default",
        "0 ready workers of 0 slots",
        "needs 1",
        "--ignore-capacity-guard",
    ] {
        assert!(said.contains(part), "{part}: {said}");
    }
    let workers = fleet.json(&["workers"]);
    let ready = workers["workers"].as_array().unwrap().iter();
    assert_eq!(ready.filter(|w| w["desired"] == "ready").count(), 1);
}

#[test]
fn what_is_in_flight_has_to_find_room_on_those_that_stay() {
    let fleet = Fleet::start(&["--workers", "2", "--engine-slots", "8"]);
    let _streams = Streams::start(&fleet, 10, (3_000, 3_000));
    within(Duration::from_secs(30), "ten run", || {
        let running = ["w1", "w2"].map(|name| metric(&fleet.admin(name), "forebay_agent_running"));
        (running.iter().sum::<f64>() >= 10.0).then_some(())
    });
    let drain = |more: &[&str]| {
        let output = fleet.run(&[&["drain", "w1", "--yes", "--no-wait"], more].concat());
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        (output.status.code().unwrap(), said)
    };
    // Agents say it with their next renewal.
    let said = within(Duration::from_secs(5), "all ten are known", || {
        let (code, said) = drain(&["--dry-run"]);
        (code == 4 && said.contains("(10 requests")).then_some(said)
    });
    for part in ["1 ready workers of 8 slots", "needs 12"] {
        assert!(said.contains(part), "{part}: {said}");
    }
    assert_eq!(drain(&[]).0, 4);
    let (code, said) = drain(&["--ignore-capacity-guard"]);
    assert_eq!(code, 0, "{said}");
}
