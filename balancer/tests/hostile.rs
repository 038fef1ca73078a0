//! Every input of the corpus, byte by byte: refused or closed on, and nothing of it reaches a worker.
#![allow(clippy::unwrap_used, clippy::panic)] // helpers of a test fail as its assertions do
#![allow(clippy::disallowed_methods)] // tests of the shell run in real time

mod common;

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use common::*;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::Semaphore;
use tokio::time::timeout;

/// A connection that has not ended by then hangs.
const BOUND: Duration = Duration::from_secs(15);
/// What the whole corpus may add to the process.
const MAX_GROWTH_BYTES: u64 = 16 << 20;

struct Input {
    name: &'static str,
    /// How it may end, `|` between alternatives: how much was sent when the other side had enough
    /// is a matter of time.
    wanted: &'static str,
    text: &'static str,
    h2: bool,
}

fn corpus() -> Vec<Input> {
    let files = [
        (false, include_str!("corpus/http1.txt")),
        (true, include_str!("corpus/http2.txt")),
    ];
    let mut inputs = Vec::new();
    for (h2, text) in files {
        for line in text.lines().filter(|line| !line.starts_with('#')) {
            let [name, wanted, text] = line.splitn(3, '\t').collect::<Vec<_>>()[..] else {
                panic!("not a line of the corpus: {line}");
            };
            inputs.push(Input {
                name,
                wanted,
                text,
                h2,
            });
        }
    }
    inputs
}

/// Sends a text of the corpus in pieces, so that a long one takes no memory. False: the other side
/// has closed.
async fn send(stream: &mut TcpStream, text: &str) -> bool {
    let mut rest = text;
    while !rest.is_empty() {
        match rest.find("{{") {
            Some(0) => {
                let end = closing(rest);
                let (count, repeated) = rest[2..end].split_once('*').unwrap();
                let count: usize = count.parse().unwrap();
                rest = &rest[end + 2..];
                if !Box::pin(repeat(stream, repeated, count)).await {
                    return false;
                }
            }
            found => {
                let end = found.unwrap_or(rest.len());
                if stream.write_all(&unescaped(&rest[..end])).await.is_err() {
                    return false;
                }
                rest = &rest[end..];
            }
        }
    }
    true
}

async fn repeat(stream: &mut TcpStream, text: &str, count: usize) -> bool {
    if text.contains("{{") {
        for _ in 0..count {
            if !send(stream, text).await {
                return false;
            }
        }
        return true;
    }
    let once = unescaped(text);
    let many = (64 << 10) / once.len().max(1) + 1;
    let piece = once.repeat(many.min(count));
    let mut left = count * once.len();
    while left > 0 {
        let part = &piece[..piece.len().min(left)];
        if stream.write_all(part).await.is_err() {
            return false;
        }
        left -= part.len();
    }
    true
}

/// Where the braces that open a repetition close.
fn closing(text: &str) -> usize {
    let mut depth = 0;
    let mut at = 0;
    while at < text.len() {
        if text[at..].starts_with("{{") {
            depth += 1;
            at += 2;
        } else if text[at..].starts_with("}}") {
            depth -= 1;
            if depth == 0 {
                return at;
            }
            at += 2;
        } else {
            at += text[at..].chars().next().unwrap().len_utf8();
        }
    }
    panic!("unclosed repetition")
}

fn unescaped(text: &str) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&first, more)) = rest.split_first() {
        rest = more;
        if first != b'\\' {
            bytes.push(first);
            continue;
        }
        let (&escape, more) = rest.split_first().unwrap();
        rest = more;
        bytes.push(match escape {
            b'r' => b'\r',
            b'n' => b'\n',
            b't' => b'\t',
            b'\\' => b'\\',
            b'x' => {
                let digits = std::str::from_utf8(&rest[..2]).unwrap();
                rest = &rest[2..];
                u8::from_str_radix(digits, 16).unwrap()
            }
            other => panic!("\\{}", char::from(other)),
        });
    }
    bytes
}

/// How a connection ended, as the corpus writes it; what hangs, or is answered well, is in no line.
async fn ends(address: SocketAddr, input: &Input) -> String {
    let mut stream = TcpStream::connect(address).await.unwrap();
    let mut seen = Vec::new();
    let talking = async {
        // What is not taken any more does not matter: the answer is in the other direction.
        send(&mut stream, input.text).await;
        let mut read = [0; 4_096];
        while let Ok(count @ 1..) = stream.read(&mut read).await {
            seen.extend_from_slice(&read[..count]);
            if input.h2 {
                // Whoever is asked to leave by a ping gets its answer.
                let pings = frames(&seen).filter(|frame| frame.kind == 6 && frame.flags == 0);
                let pongs: Vec<_> = pings.flat_map(|ping| pong(ping.payload)).collect();
                let _ = stream.write_all(&pongs).await;
            } else if is_whole(&seen) {
                break;
            }
        }
    };
    match timeout(BOUND, talking).await {
        Err(_) => "hangs".to_owned(),
        Ok(()) if input.h2 => said_in_h2(&seen),
        Ok(()) => said_in_http1(&seen),
    }
}

/// `closed`, a bare status, or a status and the code of an error object.
fn said_in_http1(answer: &[u8]) -> String {
    let text = String::from_utf8_lossy(answer);
    // Asked to go on, and then it stalls.
    let text = text.strip_prefix("HTTP/1.1 100 Continue\r\n\r\n");
    let text = text.map_or_else(|| String::from_utf8_lossy(answer), Into::into);
    let Some((head, body)) = text.split_once("\r\n\r\n") else {
        return if text.is_empty() {
            "closed"
        } else {
            "half an answer"
        }
        .to_owned();
    };
    let status = head.split(' ').nth(1).unwrap_or_default();
    if body.is_empty() {
        return status.to_owned();
    }
    let head = head.to_lowercase();
    // What follows a refused request may be refused as well.
    let first = &body[..length(&head).unwrap_or(0).min(body.len())];
    let object: serde_json::Value = serde_json::from_str(first).unwrap_or_default();
    let error = &object["error"];
    let typed = ["message", "type"].iter().all(|key| error[key].is_string())
        && head.contains("\r\nx-request-id: ")
        && head.contains("\r\ncontent-type: application/json");
    match error["code"].as_str() {
        Some(code) if typed => format!("{status} {code}"),
        _ => format!("{status} without an error object"),
    }
}

/// One frame of h2.
struct Framed<'a> {
    kind: u8,
    flags: u8,
    payload: &'a [u8],
}

fn frames(mut bytes: &[u8]) -> impl Iterator<Item = Framed<'_>> {
    std::iter::from_fn(move || {
        let head = bytes.get(..9)?;
        let length = usize::from(head[0]) << 16 | usize::from(head[1]) << 8 | usize::from(head[2]);
        let payload = bytes.get(9..9 + length)?;
        bytes = &bytes[9 + length..];
        Some(Framed {
            kind: head[3],
            flags: head[4],
            payload,
        })
    })
}

fn pong(payload: &[u8]) -> Vec<u8> {
    [&[0, 0, 8, 6, 1, 0, 0, 0, 0], payload].concat()
}

/// What the other side said of what it got: an answer's status, `reset` of a stream or `goaway` with
/// their code; `idle` if it took no offence and left when nothing more came; `closed` without a word.
fn said_in_h2(answer: &[u8]) -> String {
    let mut said = BTreeSet::new();
    for frame in frames(answer) {
        let code = |at: usize| frame.payload.get(at..at + 4).map_or(0, |code| code[3]);
        match frame.kind {
            1 => said.insert(status(frame.payload)),
            3 => said.insert(format!("reset {}", code(0))),
            7 if code(4) != 0 => said.insert(format!("goaway {}", code(4))),
            7 => said.insert("idle".to_owned()),
            _ => false,
        };
    }
    if said.len() > 1 {
        said.remove("idle");
    }
    match said.len() {
        0 => "closed".to_owned(),
        _ => said.into_iter().collect::<Vec<_>>().join("+"),
    }
}

/// The status of a block of headers: from HPACK's static table, or three digits in its Huffman code.
fn status(block: &[u8]) -> String {
    match block {
        [0x88..=0x8a, ..] => "2xx".to_owned(),
        [0x8c, ..] => "400".to_owned(),
        [0x8d, ..] => "404".to_owned(),
        [0x48, 0x82 | 0x83, coded @ ..] => digits(coded),
        _ => format!("{:#x?}", &block[..block.len().min(6)]),
    }
}

fn digits(coded: &[u8]) -> String {
    let mut bits = coded
        .iter()
        .take(3)
        .fold(0_u32, |bits, byte| bits << 8 | u32::from(*byte))
        << 8;
    let mut text = String::new();
    while text.len() < 3 {
        // 0 to 2 have five bits, 3 to 9 six.
        let (digit, length) = match bits >> 27 {
            short @ 0..=2 => (short, 5),
            _ => ((bits >> 26).wrapping_sub(22), 6),
        };
        text.push(char::from_digit(digit, 10).unwrap_or('?'));
        bits <<= length;
    }
    text
}

/// Whether an answer's announced body is there.
fn is_whole(answer: &[u8]) -> bool {
    let text = String::from_utf8_lossy(answer).to_lowercase();
    let Some((head, body)) = text.split_once("\r\n\r\n") else {
        return false;
    };
    length(head).is_some_and(|length| body.len() >= length)
}

fn length(head: &str) -> Option<usize> {
    let length = head.split("content-length: ").nth(1)?;
    length.lines().next()?.parse().ok()
}

/// What is resident of the process's own memory; without the pages of its program, which come as they are
/// first used.
fn resident_bytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("RssAnon:"));
    let kib = line.unwrap().trim().strip_suffix(" kB").unwrap();
    kib.parse::<u64>().unwrap() << 10
}

fn all_resident_bytes() -> u64 {
    let pages = std::fs::read_to_string("/proc/self/statm").unwrap();
    let resident: u64 = pages.split(' ').nth(1).unwrap().parse().unwrap();
    resident * 4_096
}

fn hurried() -> Setup {
    let mut setup = Setup::default();
    let limits = &mut setup.settings.limits;
    limits.first_bytes = Duration::from_secs(1);
    limits.header = Duration::from_secs(1);
    limits.body_pause = Duration::from_secs(1);
    limits.stall = Duration::from_secs(2);
    limits.idle = Duration::from_secs(1);
    setup
}

/// A request that is well, under a name of its own.
async fn is_served(address: SocketAddr, name: &str) {
    let mut client = Client::to(address).await;
    let id = format!("x-request-id: {GOOD}{name}\r\n");
    let body = "{\"model\":\"m\",\"messages\":[]}";
    client.post("/v1/chat/completions", &id, body).await;
    let answer = client.answer().await;
    assert_eq!(answer.status, 200, "after {name}: {}", answer.body);
}

const GOOD: &str = "good-";

#[test]
fn every_line_of_the_corpus_wants_a_refusal_or_a_close() {
    let inputs = corpus();
    assert!(inputs.len() >= 300, "{}", inputs.len());
    let names: BTreeSet<_> = inputs.iter().map(|input| input.name).collect();
    assert_eq!(names.len(), inputs.len(), "each has a name of its own");
    for Input {
        name, wanted, h2, ..
    } in inputs
    {
        for end in wanted.split('|') {
            let parts: Vec<_> = end.split('+').collect();
            let good = parts.iter().all(|part| match part.split(' ').next() {
                Some("closed") => true,
                Some("idle" | "reset" | "goaway") => h2,
                Some(status) => status.len() == 3 && status.starts_with('4'),
                None => false,
            });
            assert!(good, "{name}: {end}");
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hostile_inputs_are_refused_and_reach_no_worker() {
    let world = World::new(hurried()).await;
    let address = world.bound.listen;
    is_served(address, "the-beginning").await;
    world.settles().await;
    let before = (resident_bytes(), all_resident_bytes());
    let began = Instant::now();

    // A few at a time, and after each a request that is well.
    let at_once = Arc::new(Semaphore::new(8));
    let running: Vec<_> = corpus()
        .into_iter()
        .map(|input| {
            let at_once = at_once.clone();
            tokio::spawn(async move {
                let _turn = at_once.acquire().await.unwrap();
                let end = ends(address, &input).await;
                is_served(address, input.name).await;
                (input, end)
            })
        })
        .collect();
    let count = running.len();
    let mut wrong = Vec::new();
    let mut seen: BTreeMap<String, u32> = BTreeMap::new();
    for ended in running {
        let (input, end) = ended.await.unwrap();
        if !input.wanted.split('|').any(|wanted| wanted == end) {
            wrong.push(format!(
                "{}\t{end}\tinstead of\t{}",
                input.name, input.wanted
            ));
        }
        *seen.entry(end).or_insert(0) += 1;
    }
    world.settles().await;
    let growth = resident_bytes().saturating_sub(before.0);
    let all = all_resident_bytes().saturating_sub(before.1);
    eprintln!(
        "{count} inputs in {:?}, {} KiB more resident, {} KiB with pages of the program: {seen:?}",
        began.elapsed(),
        growth >> 10,
        all >> 10
    );
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    assert!(growth <= MAX_GROWTH_BYTES, "{growth} bytes more");
    // All that a worker ever saw are the requests that were well.
    let placed = world.agents[0].placed.lock().clone();
    let contacts: Vec<_> = placed
        .iter()
        .map(|place| place.request_id.as_str())
        .collect();
    let hostile: Vec<_> = contacts.iter().filter(|id| !id.starts_with(GOOD)).collect();
    assert!(hostile.is_empty(), "{hostile:?}");
    assert_eq!(contacts.len(), count + 1);
}
