//! The processes of the cell. Each says a line when it is ready and ends with its standard input.

use std::io::BufRead as _;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use forebay_balancer::{Fleet, Settings, serve};
use forebay_link::{Alpn, CredentialPaths, Credentials, Endpoint, Expect, Link};
use forebay_proto::config::{Config, Pool};
use forebay_proto::fleet::WorkerSpec;
use forebay_proto::frame::{Frame, Kind};
use forebay_proto::wire::fleet::Desired;
use forebay_proto::wire::work::Place;
use forebay_proto::{Incarnation, Revision, Role, WorkerId};
use forebay_scheduler::Known;
use forebay_scheduler::residency::{Kept, KeptItem};
use forebay_sim::engine;
use forebay_worker_agent::core::{Map, Settings as Limits};
use forebay_worker_agent::{KvEvents, Manner, MapFile, Patience, Setup, Work};
use tokio::sync::{Semaphore, watch};
use tokio::time::{Instant, interval, sleep};

use crate::Args;

const MODEL: &str = "m";
const CHUNK_BYTES: u32 = 256;
const CHUNK_TOKENS: u32 = 64;
/// In no part of this is anybody to be waited for so long.
const PATIENCE: Duration = Duration::from_secs(30);
/// Larger than what is put into it.
const KV_TOKENS: u64 = 4_000_000;
/// Handshakes at once of the one who drives.
const AT_ONCE: usize = 32;

/// Runs one part until its input ends.
pub(crate) fn run(part: &str, args: &Args) {
    let threads = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build();
    let dir = args.dir.clone().expect("a part is told its directory");
    threads.unwrap().block_on(async {
        match part {
            "engine" => engine().await,
            "agents" => agents(&dir, args).await,
            "balancer" => balancer(&dir, args).await,
            "driver" => driver(&dir, args).await,
            other => panic!("no part {other}"),
        }
    });
}

fn say(line: &str) {
    println!("{line}");
}

/// Lines of the input; none: it ended.
fn lines() -> tokio::sync::mpsc::Receiver<String> {
    let (sender, receiver) = tokio::sync::mpsc::channel(1);
    std::thread::spawn(move || {
        for line in std::io::stdin().lock().lines().map_while(Result::ok) {
            if sender.blocking_send(line).is_err() {
                return;
            }
        }
    });
    receiver
}

async fn until_input_ends() {
    while lines().recv().await.is_some() {}
}

fn credentials(dir: &Path, name: &str) -> Credentials {
    let paths = CredentialPaths {
        ca: dir.join("ca.pem"),
        cert: dir.join(format!("{name}.pem")),
        key: dir.join(format!("{name}-key.pem")),
    };
    Credentials::load(&paths).unwrap()
}

fn incarnation(number: u32) -> Incarnation {
    Incarnation {
        worker: WorkerId(number),
        grant: 1,
        start: 1,
    }
}

/// One engine for all agents: it is not what is measured.
async fn engine() {
    let config = engine::Config {
        models: vec![MODEL.into()],
        speed: 1_000.0,
        slots: 4_096,
        kv_tokens: 1 << 27,
        ..engine::Config::default()
    };
    let ready = |address| say(&format!("http://{address}"));
    engine::serve(config, ready, until_input_ends())
        .await
        .unwrap();
}

/// The process that the engine says it is.
async fn engine_process(url: &str) -> String {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    let authority = url.strip_prefix("http://").unwrap();
    let mut stream = tokio::net::TcpStream::connect(authority).await.unwrap();
    let ask = b"GET /metrics HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n";
    stream.write_all(ask).await.unwrap();
    let mut page = String::new();
    stream.read_to_string(&mut page).await.unwrap();
    let mut lines = page.lines();
    let start = lines.find_map(|line| line.strip_prefix("process_start_time_seconds "));
    format!("{url} since {}", start.unwrap().trim())
}

/// All agents, each with a cache that is known from an earlier start.
async fn agents(dir: &Path, args: &Args) {
    let url = args.engine.clone().unwrap();
    let process = engine_process(&url).await;
    let mut all = Vec::new();
    let mut addresses = String::new();
    for number in 1..=args.agents {
        let name = format!("w{number}");
        let map = MapFile::in_directory(&dir.join(&name));
        std::fs::create_dir(dir.join(&name)).unwrap();
        let chunk = |n: u32| KeptItem::Chunk {
            chunk: (u64::from(number) << 32 | u64::from(n)).wrapping_mul(0x9E37_79B9_7F4A_7C15),
            tokens: (n % 128 + 1) * CHUNK_TOKENS,
            own: CHUNK_TOKENS,
            counted: true,
        };
        let kept = Map {
            engine: process.clone(),
            ratio: Some(0.25),
            kept: Kept {
                capacity: KV_TOKENS as f64,
                items: (0..args.chunks).map(chunk).collect(),
            },
            exact: None,
        };
        std::fs::write(&map.path, kept.encode().unwrap()).unwrap();
        let anywhere = ([127, 0, 0, 1], 0).into();
        let endpoint = Endpoint::bind(anywhere, &credentials(dir, &name), &[Alpn::Work]).unwrap();
        let setup = Setup {
            incarnation: incarnation(number),
            settings: Limits {
                slots: 64,
                queue_limit: 64,
                body_budget_bytes: 32 << 20,
                kv_tokens: KV_TOKENS,
                profile: None,
                at_once: false,
            },
            zone: String::new(),
            engine: url.parse().unwrap(),
            patience: Patience {
                // Its looks at the engine are no part of the question.
                looks: Duration::from_secs(3_600),
                look: PATIENCE,
                ..Patience::default()
            },
            manner: Manner {
                kind: Some("vllm".into()),
                ..Manner::default()
            },
            kv_events: KvEvents::default(),
            map: Some(MapFile {
                every: Duration::from_secs(3_600),
                ..map
            }),
        };
        let work = Work::start(&endpoint, setup);
        work.apply(Desired::Ready, Revision(1));
        let mut status = work.status();
        let known = status.wait_for(|status| !status.models.is_empty());
        drop(
            tokio::time::timeout(PATIENCE, known)
                .await
                .unwrap()
                .unwrap(),
        );
        addresses += &format!("{}\n", endpoint.local_addr().unwrap());
        all.push((work, endpoint));
    }
    std::fs::write(dir.join("agents"), addresses).unwrap();
    say("ready");
    until_input_ends().await;
}

fn addresses(dir: &Path) -> Vec<String> {
    let text = std::fs::read_to_string(dir.join("agents")).unwrap();
    text.lines().map(str::to_owned).collect()
}

/// A balancer as it is, but for the control plane: its facts are handed in.
async fn balancer(dir: &Path, args: &Args) {
    let known = |(number, advertise): (u32, String)| Known {
        name: format!("w{number}"),
        incarnation: incarnation(number),
        spec: WorkerSpec {
            pool: "default".into(),
            advertise,
            engine: "emulated".into(),
            models: vec![MODEL.into()],
            revision: String::new(),
            gpu_type: String::new(),
            gpu_count: 0,
            kv_tokens: KV_TOKENS,
            max_context_tokens: 0,
            adapters: Vec::new(),
            zone: String::new(),
            labels: std::collections::BTreeMap::new(),
            slots: 64,
        },
        desired: Desired::Ready,
        departed: false,
    };
    let fleet = Fleet {
        revision: Revision(1),
        workers: (1..).zip(addresses(dir)).map(known).collect(),
        config: Config {
            pools: vec![Pool::named("default")],
        },
        keys: Vec::new(),
        families: Vec::new(),
        suspects: Vec::new(),
        cell_time: forebay_proto::Millis(0),
    };
    let (_keep, facts) = watch::channel(Some(Arc::new(fleet)));
    let anywhere = ([127, 0, 0, 1], 0).into();
    let mut settings = Settings::on(anywhere);
    settings.admin = Some(anywhere);
    settings.any_key_tenant = Some("dev".into());
    let endpoint = Endpoint::client(&credentials(dir, &format!("b{}", args.number))).unwrap();
    let bound = |bound: forebay_balancer::Bound| say(&bound.admin.unwrap().to_string());
    serve(settings, endpoint, facts, bound, until_input_ends())
        .await
        .unwrap();
}

/// Stands for all other balancers: places requests whose prompts nobody holds, each on the next agent, so
/// that the caches of all change. Its input says `RATE SECONDS PROMPT_CHUNKS`.
async fn driver(dir: &Path, args: &Args) {
    let endpoint = Endpoint::client(&credentials(dir, "b0")).unwrap();
    let turns = Arc::new(Semaphore::new(AT_ONCE));
    let dials = (1..=args.agents)
        .zip(addresses(dir))
        .map(|(number, address)| {
            let (endpoint, turns) = (endpoint.clone(), turns.clone());
            tokio::spawn(async move {
                let _turn = turns.acquire_owned().await.unwrap();
                let expect = Expect::named(Role::Agent, &format!("w{number}"));
                let dialled = endpoint.connect(&address, Alpn::Work, &expect, PATIENCE);
                (number, dialled.await.unwrap())
            })
        });
    let dials: Vec<_> = dials.collect();
    let mut links = Vec::new();
    for dial in dials {
        let (number, link) = dial.await.unwrap();
        let reports = link.clone();
        // Otherwise they would be kept.
        tokio::spawn(async move { while reports.read_datagram().await.is_ok() {} });
        links.push((number, link));
    }
    say("ready");
    let mut orders = lines();
    let mut next = 1_u64;
    while let Some(order) = orders.recv().await {
        let mut words = order.split(' ').map(|word| word.parse::<u64>().unwrap());
        let [rate, seconds, chunks] = [(); 3].map(|()| words.next().unwrap());
        let (placed, failed) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
        let mut ticks = interval(Duration::from_secs_f64(1.0 / rate as f64));
        let end = Instant::now() + Duration::from_secs(seconds);
        while ticks.tick().await < end {
            let (number, link) = links[next as usize % links.len()].clone();
            let first = next << 16;
            let prompt = (0..chunks).map(|n| (first | n).wrapping_mul(0xD6E8_FEB8_6659_FD93));
            let place = self::place(number, prompt.collect());
            let (placed, failed) = (placed.clone(), failed.clone());
            tokio::spawn(async move {
                let count = if carried(&link, place).await {
                    placed
                } else {
                    failed
                };
                count.fetch_add(1, Ordering::Relaxed);
            });
            next += 1;
        }
        sleep(Duration::from_millis(500)).await;
        let [placed, failed] = [placed, failed].map(|count| count.load(Ordering::Relaxed));
        say(&format!("{placed} {failed}"));
    }
}

fn body(chunks: usize) -> String {
    let text = "x".repeat(chunks * CHUNK_BYTES as usize);
    format!(r#"{{"model":"{MODEL}","prompt":"{text}","max_tokens":1,"stream":false}}"#)
}

fn place(number: u32, chunks: Vec<u64>) -> (Place, String) {
    let body = body(chunks.len());
    let count = u32::try_from(chunks.len()).unwrap();
    let place = Place {
        request_id: "r".into(),
        incarnation: Some(incarnation(number).to_wire()),
        model: MODEL.into(),
        tenant: "t".into(),
        path: "/v1/completions".into(),
        body_bytes: body.len() as u64,
        deadline_ms: 30_000,
        prompt_bytes: u64::from(count * CHUNK_BYTES),
        chunk_bytes: CHUNK_BYTES,
        prompt_tokens: count * CHUNK_TOKENS,
        max_tokens: 1,
        chunks,
        ..Place::default()
    };
    (place, body)
}

/// Whether it was placed and answered to its end.
async fn carried(link: &Link, (place, body): (Place, String)) -> bool {
    let Ok((mut sender, mut receiver)) = link.open() else {
        return false;
    };
    let place = Frame::message(Kind::Place, &place);
    if sender.send(&place).await.is_err() {
        return false;
    }
    if !matches!(receiver.recv().await, Ok(Some(frame)) if frame.kind == Kind::Accepted) {
        return false;
    }
    for frame in [
        Frame::new(Kind::Body, Bytes::from(body)),
        Frame::new(Kind::BodyEnd, Bytes::new()),
    ] {
        if sender.send(&frame).await.is_err() {
            return false;
        }
    }
    let mut last = None;
    while let Ok(Some(frame)) = receiver.recv().await {
        last = Some(frame.kind);
    }
    last == Some(Kind::Trailer)
}
