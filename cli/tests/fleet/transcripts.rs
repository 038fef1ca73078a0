//! Commands as they are typed, with what they print and how they exit, beside what is expected.
//!
//! In a transcript `$ forebay …` is run and `exit N` follows what it printed; `#` is a comment; `!` does
//! something to the fleet: see [`Stage::act`]. Numbers that differ from run to run are written `N`.
//! `FOREBAY_WRITE_DOCS=1` writes the file as things are.

use std::path::Path;
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};

use crate::drain::Streams;
use crate::harness::{Fleet, forebay, metric, post, within};

struct Stage {
    fleet: Fleet,
    /// In whose name.
    context: std::path::PathBuf,
    streams: Vec<Streams>,
    /// Of the newest drain, printed as `dN`.
    newest: String,
}

impl Stage {
    fn new() -> Self {
        let fleet = Fleet::start(&["--control", "3", "--workers", "3"]);
        fleet.wait_for_control(3);
        Self {
            context: fleet.data().join("context.toml"),
            fleet,
            streams: Vec::new(),
            newest: String::new(),
        }
    }

    fn act(&mut self, line: &str) {
        let words: Vec<&str> = line.split_whitespace().collect();
        match words[..] {
            // Clients whose streams are as long as they may be, until every worker has some.
            ["streams"] => {
                within(Duration::from_secs(60), "streams everywhere", || {
                    self.streams
                        .push(Streams::start(&self.fleet, 10, (2_000, 2_000)));
                    std::thread::sleep(Duration::from_secs(1));
                    let busy = ["w1", "w2", "w3"].map(|worker| {
                        let admin = self.fleet.admin(worker);
                        metric(&admin, "forebay_agent_running") > 0.0
                    });
                    (busy == [true; 3]).then_some(())
                });
                // Agents say it once a second.
                std::thread::sleep(Duration::from_secs(3));
            }
            ["freeze", name] => self.signal(name, Signal::STOP),
            ["thaw", name] => self.signal(name, Signal::CONT),
            ["kill", name] => self.fleet.kill(name),
            ["as", level] => self.context = self.issued(level),
            // Conversations that begin alike, until what they share has a home.
            ["hot"] => self.hot(),
            // Its plan: a home on every other worker, one after the other.
            ["plan"] => self.plan_for_all(),
            // A plan that somebody wrote: a family that nobody knows goes to this worker.
            ["plan", to] => self.plan("000000000000feed", &[to]),
            ["wait"] => std::thread::sleep(Duration::from_secs(3)),
            _ => panic!("nobody knows how to {line}"),
        }
    }

    fn signal(&self, name: &str, signal: Signal) {
        let pid = Pid::from_raw(self.fleet.process(name).pid).unwrap();
        kill_process(pid, signal).unwrap();
    }

    fn hot(&self) {
        let url = format!("{}/v1/chat/completions", self.fleet.url);
        let mut turn = 0;
        within(Duration::from_secs(60), "a family with a home", || {
            turn += 1;
            let (shared, own) = ("all of us ".repeat(600), format!("{turn} ").repeat(600));
            let body = format!(
                r#"{{"model":"emulated","max_tokens":2,"messages":[{{"role":"system","content":"{shared}"}},{{"role":"user","content":"{own}"}}]}}"#
            );
            assert_eq!(post(&url, &body).0, 200);
            std::thread::sleep(Duration::from_millis(200));
            self.family()
        });
    }

    /// What has a home, and where.
    fn family(&self) -> Option<(String, Vec<String>)> {
        let homes = self.fleet.json(&["homes"]);
        let family = homes["families"].as_array()?.first()?;
        let at = family["homes"].as_array()?.iter();
        let at = at.filter_map(|home| home.as_str().map(Into::into));
        Some((family["name"].as_str()?.into(), at.collect()))
    }

    fn plan_for_all(&self) {
        let (family, homes) = self.family().unwrap();
        let free = ["w1", "w2", "w3"].into_iter();
        let free: Vec<&str> = free
            .filter(|name| homes.iter().all(|home| home != name))
            .collect();
        assert_eq!(free.len(), 2, "{homes:?}");
        self.plan(&family, &free);
    }

    fn plan(&self, family: &str, to: &[&str]) {
        let status = self.fleet.json(&["status"]);
        let mut cluster = status["cluster_id"].clone();
        if to == ["elsewhere"] {
            cluster = "0123456789abcdef0123456789abcdef".into();
        }
        let forecast = serde_json::json!({
            "hit_ratio": 0.5, "in_time": 1.0, "arrivals": 9, "window_ms": 60_000, "workers": [],
        });
        let to = to.iter();
        let moves = to.map(|to| serde_json::json!({"family": family, "from": null, "to": to}));
        let plan = serde_json::json!({
            "schema_version": 1, "cluster_id": cluster, "pool": "default", "revision": 1,
            "planned_ms": 1, "before": forecast, "after": forecast, "measured": forecast,
            "moves": moves.collect::<Vec<_>>(), "silent": [], "families": [],
        });
        std::fs::write(self.plan_file(), plan.to_string()).unwrap();
    }

    fn plan_file(&self) -> std::path::PathBuf {
        self.fleet.dir.path().join("plan.json")
    }

    /// A context with a certificate of this level.
    fn issued(&self, level: &str) -> std::path::PathBuf {
        let (data, out) = (self.fleet.data(), self.fleet.dir.path());
        let issued = forebay()
            .args(["ca", "issue", "--name", level, "--role"])
            .arg(format!("operator/{level}"))
            .arg("--dir")
            .arg(data.join("ca"))
            .arg("--out")
            .arg(out)
            .output()
            .unwrap();
        assert!(issued.status.success(), "{issued:?}");
        let text = std::fs::read_to_string(data.join("context.toml")).unwrap();
        let mut context: toml::Table = text.parse().unwrap();
        for (key, ending) in [("cert", ".pem"), ("key", "-key.pem")] {
            let file = format!("{level}{ending}");
            let path = out.join(file).display().to_string();
            context.insert(key.into(), path.into());
        }
        let path = out.join(format!("{level}.toml"));
        std::fs::write(&path, context.to_string()).unwrap();
        path
    }

    /// What it prints and how it exits, as a transcript has it.
    fn answer(&mut self, command: &str) -> String {
        let (said, code) = self.run(command);
        if let Some(id) = newest(&said) {
            self.newest = id;
        }
        // Progress depends on the moment.
        let lines = said.lines().filter(|line| !is_progress(line));
        let said: String = lines
            // Who of the control nodes said what depends on the moment, too.
            .map(|line| line.split(" (127.").next().unwrap())
            .map(|line| normal(&without_ids(line)) + "\n")
            .collect();
        format!("{said}exit {code}\n")
    }

    /// What it prints, stdout and stderr as they come, and how it exits.
    fn run(&self, line: &str) -> (String, i32) {
        let plan = self.plan_file().display().to_string();
        let words = words(&line.replace("$d", &self.newest).replace("PLAN", &plan));
        let path = self.fleet.dir.path().join("printed");
        let printed = std::fs::File::create(&path).unwrap();
        let status = forebay()
            .args(&words[1..])
            .env("FOREBAY_CONTEXT", &self.context)
            .stdout(printed.try_clone().unwrap())
            .stderr(printed)
            .status()
            .unwrap();
        let said = std::fs::read_to_string(path).unwrap();
        (said, status.code().unwrap())
    }
}

/// Words as a shell would see them, with single quotes.
pub(super) fn words(line: &str) -> Vec<String> {
    let mut words = vec![];
    for (i, part) in line.split('\'').enumerate() {
        if i % 2 == 1 {
            words.push(part.to_owned());
        } else {
            words.extend(part.split_whitespace().map(Into::into));
        }
    }
    words
}

/// Ids of clusters are drawn.
fn without_ids(line: &str) -> String {
    let is_id = |word: &str| word.len() == 32 && word.bytes().all(|b| b.is_ascii_hexdigit());
    let words = line.split(' ').map(|word| {
        let bare = word.trim_end_matches(',');
        if is_id(bare) {
            word.replace(bare, "ID")
        } else {
            word.into()
        }
    });
    words.collect::<Vec<String>>().join(" ")
}

/// What differs from run to run, by its kind.
fn normal(text: &str) -> String {
    let mut out = String::new();
    let mut rest = text;
    while let Some(at) = rest.find(|c: char| c.is_ascii_digit()) {
        let (before, digits) = rest.split_at(at);
        let end = digits
            .find(|c: char| !c.is_ascii_digit())
            .unwrap_or(digits.len());
        let (number, after) = digits.split_at(end);
        out += before;
        let letter = before.chars().next_back();
        let inside = before
            .chars()
            .rev()
            .nth(1)
            .is_some_and(char::is_alphanumeric);
        let id = matches!(letter, Some('r' | 'd')) && !inside;
        let unit = [" ms", " s", " tokens left", " in flight", " requests are"];
        let varies = id || unit.iter().any(|unit| after.starts_with(unit));
        let varies = varies || before.ends_with("\"revision\": ") || before.ends_with("_ms\": ");
        // Balancers say what they have applied within a second.
        let varies = varies || before.ends_with("balancers ") || before.ends_with("\"applied\": ");
        let decided = before.ends_with("timeout ") || after.starts_with(" slots");
        out += if (varies && !decided) || number.len() > 4 {
            "N"
        } else {
            number
        };
        rest = after;
    }
    out + rest
}

fn played(path: &Path) {
    let expected = std::fs::read_to_string(path).unwrap();
    let mut stage = Stage::new();
    let mut actual = String::new();
    let mut lines = expected.lines();
    while let Some(line) = lines.next() {
        actual += &format!("{line}\n");
        if let Some(act) = line.strip_prefix("! ") {
            stage.act(act);
        } else if let Some(command) = line.strip_prefix("$ ") {
            actual += &stage.answer(command);
            // What is expected of it; a new command has nothing yet.
            let rest = lines.clone();
            let until = rest.take_while(|line| !line.starts_with(['$', '!', '#']));
            if let Some(at) = until.clone().position(|line| line.starts_with("exit ")) {
                lines.by_ref().take(at + 1).for_each(drop);
            }
        }
    }
    if std::env::var_os("FOREBAY_WRITE_DOCS").is_some() {
        std::fs::write(path, &actual).unwrap();
    }
    assert_eq!(actual, expected, "{actual}");
}

/// The drain that a command began.
fn newest(said: &str) -> Option<String> {
    let line = said.lines().find(|line| line.contains(" drains "))?;
    line.split(' ').next().map(Into::into)
}

fn is_progress(line: &str) -> bool {
    if line.contains(" of 2: family ") {
        return true;
    }
    let mut words = line.split(' ');
    words.next().is_some_and(|word| word.starts_with('d'))
        && words.next().is_some_and(|word| word.ends_with(':'))
        && line.contains("in flight")
}

#[test]
fn verbs_that_take_workers_out_of_service_answer_as_written() {
    let path = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/tests/fleet/operate.transcript"
    );
    played(Path::new(path));
}

#[test]
fn verbs_that_move_homes_answer_as_written() {
    let path = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/tests/fleet/rebalance.transcript"
    );
    played(Path::new(path));
}

#[test]
fn verbs_that_look_answer_as_written() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fleet/look.transcript");
    played(Path::new(path));
}

#[test]
fn the_runbook_for_taking_a_worker_out_works_as_printed() {
    let manual = include_str!("../../../docs/operators.md");
    let section = manual.split("\n## ").filter(|section| {
        section.starts_with("Cordon a worker")
            || section.starts_with("Bring a worker back")
            || section.starts_with("Drain a worker")
            || section.starts_with("Even out load")
    });
    let fleet = Fleet::start(&["--workers", "3", "--engine-speed", "10"]);
    let mut ran = 0;
    for block in section.flat_map(|section| section.split("```sh\n").skip(1)) {
        let block = block.split("```").next().unwrap();
        for line in block.lines().filter(|line| line.starts_with("forebay ")) {
            let command = line.split(" # ").next().unwrap();
            let words = words(command);
            let args: Vec<&str> = words[1..].iter().map(String::as_str).collect();
            let output = fleet.run(&args);
            let stderr = String::from_utf8_lossy(&output.stderr);
            assert!(output.status.success(), "{command}: {stderr}");
            ran += 1;
        }
    }
    assert!(ran >= 13, "{ran} commands");
}

#[test]
fn numbers_that_vary_are_told_from_those_that_do_not() {
    for (text, expected) in [
        (
            "cordoned 1 as r13, in force after 35 ms",
            "cordoned 1 as rN, in force after N ms",
        ),
        ("d22 drains w1, w2", "dN drains w1, w2"),
        (
            "left with 1 ready workers of 256 slots, and needs 360 (300 requests are in flight)",
            "left with 1 ready workers of 256 slots, and needs 360 (N requests are in flight)",
        ),
        ("127.0.0.1:29597", "127.0.0.1:N"),
    ] {
        assert_eq!(normal(text), expected);
    }
}
