//! Network namespaces of this test's own: a bridge in one, a node in each of the others.

use std::io::Write;
use std::os::fd::AsFd;
use std::process::{Command, Output, Stdio};

use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

/// The nodes' namespaces and what joins them. Gone with this value.
pub struct Net {
    /// All names begin with this; it has our pid.
    prefix: String,
    /// Whether this kernel delays packets; else links are made slow by their rate.
    pub netem: bool,
}

/// Bound of a run's names; a node's number is its address's last byte.
const NODES: [usize; 3] = [1, 2, 3];

impl Net {
    /// Makes the namespaces and moves this thread to the bridge.
    ///
    /// # Errors
    ///
    /// Returns what this machine does not allow.
    pub fn new() -> Result<Self, String> {
        remove_leftovers();
        let mut net = Self {
            prefix: format!("forebay{}", std::process::id()),
            netem: false,
        };
        let hub = net.name(0);
        run("ip", &["netns", "add", &hub])?;
        net.ip(0, "link set lo up")?;
        net.ip(0, "link add br0 type bridge forward_delay 0")?;
        net.ip(0, "addr add 10.77.0.254/24 dev br0")?;
        net.ip(0, "link set br0 up")?;
        for node in NODES {
            run("ip", &["netns", "add", &net.name(node)])?;
            let peer = net.name(node);
            net.ip(
                0,
                &format!("link add v{node} type veth peer name eth0 netns {peer}"),
            )?;
            net.ip(0, &format!("link set v{node} master br0 up"))?;
            net.ip(node, "link set lo up")?;
            net.ip(node, &format!("addr add 10.77.0.{node}/24 dev eth0"))?;
            net.ip(node, "link set eth0 up")?;
            net.filter(node, &[])?;
        }
        net.netem = net.shape(1, Some("netem delay 1ms")).is_ok();
        net.shape(1, None)?;
        move_to(&hub)?;
        Ok(net)
    }

    fn name(&self, node: usize) -> String {
        format!("{}n{node}", self.prefix)
    }

    pub fn address(node: usize) -> String {
        format!("10.77.0.{node}:7400")
    }

    /// The command, to be run where this node is.
    pub fn inside(&self, node: usize, program: &str) -> Command {
        let mut command = Command::new("nsenter");
        command
            .arg(format!("--net=/run/netns/{}", self.name(node)))
            .arg(program);
        command
    }

    fn ip(&self, node: usize, args: &str) -> Result<(), String> {
        let words: Vec<&str> = args.split(' ').collect();
        run("ip", &[&["-n", &self.name(node)], &words[..]].concat())
    }

    /// Pulls a node's cable, or plugs it in.
    pub fn plug(&self, node: usize, plugged: bool) -> Result<(), String> {
        let state = if plugged { "up" } else { "down" };
        self.ip(0, &format!("link set v{node} {state}"))
    }

    /// Drops what these rules match of what arrives at a node; none heals it.
    pub fn filter(&self, node: usize, rules: &[String]) -> Result<(), String> {
        let table = "table ip faults";
        let rules = rules.join("\n");
        let script = format!(
            "{table}\ndelete {table}\n{table} {{\nchain arrives {{ type filter hook input priority 0;\n{rules}\n}}\n}}\n"
        );
        let mut nft = self
            .inside(node, "nft")
            .args(["-f", "-"])
            .stdin(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(|error| format!("nft: {error}"))?;
        let sent = nft.stdin.take().unwrap().write_all(script.as_bytes());
        sent.map_err(|error| format!("nft: {error}"))?;
        let output = nft.wait_with_output();
        done("nft", output)
    }

    /// Queues what leaves a node like this; `None` heals it.
    pub fn shape(&self, node: usize, how: Option<&str>) -> Result<(), String> {
        let args = how.map_or_else(
            || "qdisc del dev eth0 root".to_owned(),
            |how| format!("qdisc replace dev eth0 root {how}"),
        );
        let output = self.inside(node, "tc").args(args.split(' ')).output();
        // Without a queue there is nothing to heal.
        done("tc", output).or_else(|problem| how.map_or(Ok(()), |_| Err(problem)))
    }
}

impl Drop for Net {
    fn drop(&mut self) {
        for node in [0].into_iter().chain(NODES) {
            // A veth goes with its namespace.
            let _ = run("ip", &["netns", "del", &self.name(node)]);
        }
    }
}

/// Namespaces of runs that were killed: their names have the pid of a process that is gone.
fn remove_leftovers() {
    for entry in std::fs::read_dir("/run/netns")
        .into_iter()
        .flatten()
        .flatten()
    {
        let name = entry.file_name().to_string_lossy().into_owned();
        let pid = name
            .strip_prefix("forebay")
            .and_then(|rest| rest.split_once('n'))
            .filter(|(pid, node)| pid.parse::<u32>().is_ok() && node.parse::<u32>().is_ok());
        if let Some((pid, _)) = pid
            && !std::path::Path::new(&format!("/proc/{pid}")).exists()
        {
            let _ = run("ip", &["netns", "del", &name]);
        }
    }
}

/// Moves this thread into a namespace, and all that it starts from then on.
fn move_to(name: &str) -> Result<(), String> {
    let file = std::fs::File::open(format!("/run/netns/{name}")).map_err(|e| e.to_string())?;
    move_into_link_name_space(file.as_fd(), Some(LinkNameSpaceType::Network))
        .map_err(|error| format!("setns: {error}"))
}

/// Runs a program to its end.
pub fn run(program: &str, args: &[&str]) -> Result<(), String> {
    let output = Command::new(program).args(args).output();
    done(&format!("{program} {}", args.join(" ")), output)
}

fn done(what: &str, output: std::io::Result<Output>) -> Result<(), String> {
    let output = output.map_err(|error| format!("{what}: {error}"))?;
    if output.status.success() {
        return Ok(());
    }
    Err(format!(
        "{what}: {}",
        String::from_utf8_lossy(&output.stderr).trim()
    ))
}
