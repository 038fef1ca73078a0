//! Three control nodes as processes, and hands to hurt and heal them.

use std::fs::File;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use forebay_control_client::{ControlClient, Facts};
use forebay_link::{Authority, CredentialPaths, Credentials, Endpoint};
use forebay_proto::{ClientId, ClusterId, Level, Role};
use rustix::process::{Pid, Signal, kill_process};

use crate::net::{Net, run};

const NODES: usize = 3;
/// The disk of one node: its log, two snapshots, and little more.
const SMALL_DISK: &str = "size=40m";
const DEADLINE: Duration = Duration::from_secs(10);

/// The control nodes of one cell. They end with this value.
pub struct Cell {
    nodes: Vec<Node>,
    authority: Authority,
    /// Without it the nodes are on loopback.
    pub net: Option<Net>,
    /// The first node's disk is small, and its own.
    pub small_disk: Option<SmallDisk>,
    dir: tempfile::TempDir,
}

struct Node {
    process: Option<Child>,
    address: String,
    credentials: CredentialPaths,
}

/// A file system in memory, unmounted with this value.
pub struct SmallDisk(PathBuf);

impl SmallDisk {
    fn mount(dir: PathBuf) -> Result<Self, String> {
        std::fs::create_dir_all(&dir).unwrap();
        let path = dir.to_str().unwrap();
        run(
            "mount",
            &["-t", "tmpfs", "-o", SMALL_DISK, "forebay-test", path],
        )?;
        Ok(Self(dir))
    }

    /// Another file takes all the room that is left.
    pub fn fill(&self) {
        use std::io::Write;
        let mut file = File::create(self.0.join("somebody-elses")).unwrap();
        for size in [1 << 16, 1 << 10, 1] {
            while file.write_all(&vec![1; size]).is_ok() {}
        }
    }

    /// That file is gone again.
    pub fn make_room(&self) {
        let _ = std::fs::remove_file(self.0.join("somebody-elses"));
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = run("umount", &[self.0.to_str().unwrap()]);
    }
}

impl Cell {
    /// Starts the nodes, and moves this thread to where it reaches them.
    pub fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let net = Net::new()
            .inspect_err(|problem| println!("SKIPPED: the faults of the network: {problem}"));
        let small_disk = SmallDisk::mount(dir.path().join("c1"))
            .inspect_err(|problem| println!("SKIPPED: the full disk: {problem}"));
        let mut cell = Self {
            nodes: vec![],
            authority: Authority::create("faults", 7).unwrap(),
            net: net.ok(),
            small_disk: small_disk.ok(),
            dir,
        };
        for number in 1..=NODES {
            let address = match &cell.net {
                Some(_) => Net::address(number),
                None => free_address(),
            };
            let credentials = cell.issue(Role::Control, &format!("c{number}"));
            cell.nodes.push(Node {
                process: None,
                address,
                credentials,
            });
            cell.start(number);
        }
        cell
    }

    /// Makes the nodes one cluster.
    pub async fn found(&self) {
        let admin = self.client(Role::Operator(Level::Admin), "founder", self.addresses());
        let began = Instant::now();
        while let Err(problem) = admin.init(ClusterId([9; 16]), DEADLINE).await {
            assert!(began.elapsed() < DEADLINE, "{problem}");
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }

    fn issue(&self, role: Role, name: &str) -> CredentialPaths {
        let own = tempfile::tempdir_in(self.dir.path()).unwrap().keep();
        self.authority.save(&own).unwrap();
        let issued = self.authority.issue(role, name, 30).unwrap();
        let (cert, key) = issued.save(&own).unwrap();
        let ca = own.join("ca.pem");
        CredentialPaths { ca, cert, key }
    }

    /// Someone who asks these nodes; within the runtime.
    pub fn client(&self, role: Role, name: &str, control: Vec<String>) -> ControlClient {
        let credentials = Credentials::load(&self.issue(role, name)).unwrap();
        let endpoint = Endpoint::client(&credentials).unwrap();
        ControlClient::new(endpoint, control, ClientId(rand::random()), rand::random())
    }

    pub fn addresses(&self) -> Vec<String> {
        let addresses = self.nodes.iter().map(|node| node.address.clone());
        addresses.collect()
    }

    pub const fn numbers() -> std::ops::RangeInclusive<usize> {
        1..=NODES
    }

    fn log(&self, number: usize) -> PathBuf {
        self.dir.path().join(format!("c{number}.log"))
    }

    pub fn start(&mut self, number: usize) {
        let mut log = File::options();
        let log = log
            .create(true)
            .append(true)
            .open(self.log(number))
            .unwrap();
        let program = std::env::var("FOREBAY_FAULT_PROGRAM");
        let program = program.unwrap_or_else(|_| env!("CARGO_BIN_EXE_forebay").into());
        let mut command = match &self.net {
            Some(net) => net.inside(number, &program),
            None => Command::new(&program),
        };
        let node = &mut self.nodes[number - 1];
        assert!(node.process.is_none(), "c{number} runs");
        command
            .args(["control", "--admin", "127.0.0.1:0", "--listen"])
            .arg(&node.address)
            .arg("--data-dir")
            .arg(self.dir.path().join(format!("c{number}")).join("data"))
            .arg("--ca")
            .arg(&node.credentials.ca)
            .arg("--cert")
            .arg(&node.credentials.cert)
            .arg("--key")
            .arg(&node.credentials.key)
            // It dies with this thread.
            .env("FOREBAY_PARENT_PID", std::process::id().to_string())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log);
        node.process = Some(command.spawn().unwrap());
    }

    /// kill -9, and waits until it is gone.
    pub fn kill(&mut self, number: usize) {
        self.nobody_ended();
        if let Some(mut process) = self.nodes[number - 1].process.take() {
            process.kill().unwrap();
            process.wait().unwrap();
        }
    }

    /// The process stands still, or goes on.
    pub fn stand_still(&self, number: usize, still: bool) {
        let process = self.nodes[number - 1].process.as_ref().unwrap();
        let pid = Pid::from_raw(i32::try_from(process.id()).unwrap()).unwrap();
        let signal = if still { Signal::STOP } else { Signal::CONT };
        kill_process(pid, signal).unwrap();
    }

    /// No node ends by itself, whatever happens to it.
    pub fn nobody_ended(&mut self) {
        for (node, number) in self.nodes.iter_mut().zip(1..) {
            if let Some(process) = &mut node.process
                && let Some(status) = process.try_wait().unwrap()
            {
                panic!("c{number} ended by itself with {status}");
            }
        }
    }

    pub fn nobody_panicked(&mut self) {
        self.nobody_ended();
        for number in Self::numbers() {
            let log = std::fs::read_to_string(self.log(number)).unwrap();
            assert!(!log.contains("panicked"), "c{number}:\n{log}");
        }
    }

    /// Which node leads, as most recently heard.
    pub async fn leader(&self) -> Option<usize> {
        let admin = self.client(Role::Operator(Level::Admin), "looker", self.addresses());
        let probed = admin.probe_all(Duration::from_millis(500)).await;
        let leading = probed.into_iter().filter_map(|(address, status)| {
            let status = status.ok().filter(|status| status.role == "leader")?;
            Some((status.term, address))
        });
        let (_, address) = leading.max()?;
        Some(1 + self.addresses().iter().position(|one| *one == address)?)
    }

    /// Waits until each node by itself has the same facts and the same audit as the others.
    pub async fn all_know_the_same(&self, limit: Duration) -> String {
        let began = Instant::now();
        loop {
            let mut known = vec![];
            for node in &self.nodes {
                known.push(self.known_by(&node.address).await);
            }
            if let [Some(first), others @ ..] = &known[..]
                && others.iter().all(|other| other.as_ref() == Some(first))
            {
                let (facts, head) = first;
                let head: String = head.iter().map(|byte| format!("{byte:02x}")).collect();
                return format!("revision {}, audit {head}", facts.revision.0);
            }
            assert!(began.elapsed() < limit, "nodes differ: {known:#?}");
        }
    }

    /// The facts of this node alone, fingerprint keys included, and the head of its audit.
    async fn known_by(&self, address: &str) -> Option<(Arc<Facts>, Vec<u8>)> {
        let alone = || vec![address.to_owned()];
        let mut watching = self.client(Role::Balancer, "b1", alone()).spawn_watch(None);
        let facts = tokio::time::timeout(DEADLINE, watching.first())
            .await
            .ok()?;
        let admin = self.client(Role::Operator(Level::Admin), "looker", alone());
        let audit = admin.audit(1, DEADLINE).await.ok()?;
        Some((facts, audit.head.to_vec()))
    }
}

impl Drop for Cell {
    fn drop(&mut self) {
        for node in &mut self.nodes {
            if let Some(mut process) = node.process.take() {
                let _ = process.kill();
                let _ = process.wait();
            }
        }
        if std::thread::panicking() {
            for number in Self::numbers() {
                let log = std::fs::read_to_string(self.log(number)).unwrap_or_default();
                let lines: Vec<&str> = log.lines().collect();
                let tail = lines[lines.len().saturating_sub(40)..].join("\n");
                eprintln!("---- c{number}\n{tail}");
            }
        }
    }
}

/// Below the ports that systems give out: a node that is down must find its own free when it returns.
fn free_address() -> String {
    let mut addresses =
        std::iter::repeat_with(|| format!("127.0.0.1:{}", rand::random_range(10_000..32_000_u16)));
    let is_free = |address: &String| std::net::UdpSocket::bind(address).is_ok();
    addresses.find(is_free).unwrap()
}
