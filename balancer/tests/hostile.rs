//! Every input of the corpus, byte by byte: refused or closed on, and nothing of it reaches a worker.
#![allow(clippy::unwrap_used, clippy::panic)] // helpers of a test fail as its assertions do
#![allow(clippy::disallowed_methods)] // tests of the shell run in real time

mod common;

use std::collections::BTreeMap;
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
    text: &'static str,
}

fn corpus(text: &'static str) -> Vec<Input> {
    let lines = text.lines().filter(|line| !line.starts_with('#'));
    let input = |line: &'static str| {
        let (name, text) = line.split_once('\t').unwrap();
        Input { name, text }
    };
    lines.map(input).collect()
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

/// How a connection ended.
#[derive(Debug, PartialEq)]
enum End {
    Status(u16),
    Closed,
    Hangs,
}

async fn ends(address: SocketAddr, text: &str) -> End {
    let mut stream = TcpStream::connect(address).await.unwrap();
    let (mut read, mut answer) = ([0; 4_096], Vec::new());
    let talking = async {
        // What is not taken any more does not matter: the answer is in the other direction.
        send(&mut stream, text).await;
        while let Ok(count @ 1..) = stream.read(&mut read).await {
            answer.extend_from_slice(&read[..count]);
            if is_whole(&answer) {
                break;
            }
        }
    };
    let hangs = timeout(BOUND, talking).await.is_err();
    let status = answer
        .strip_prefix(b"HTTP/1.1 ")
        .or(answer.strip_prefix(b"HTTP/1.0 "))
        .and_then(|rest| std::str::from_utf8(&rest[..3]).ok())
        .and_then(|status| status.parse().ok());
    match status {
        // Asked to go on, and then it stalls.
        Some(100) if !hangs => End::Closed,
        Some(status) => End::Status(status),
        None if hangs => End::Hangs,
        None => End::Closed,
    }
}

/// Whether an answer's announced body is there.
fn is_whole(answer: &[u8]) -> bool {
    let text = String::from_utf8_lossy(answer).to_lowercase();
    let Some((head, body)) = text.split_once("\r\n\r\n") else {
        return false;
    };
    let length = head.split("content-length: ").nth(1);
    let length = length.and_then(|rest| rest.lines().next()?.parse::<usize>().ok());
    length.is_some_and(|length| body.len() >= length)
}

fn resident_bytes() -> u64 {
    let pages = std::fs::read_to_string("/proc/self/statm").unwrap();
    let resident: u64 = pages.split(' ').nth(1).unwrap().parse().unwrap();
    resident * 4_096
}

fn hurried() -> Setup {
    let mut setup = Setup::default();
    let limits = &mut setup.settings.limits;
    limits.first_bytes = Duration::from_millis(500);
    limits.header = Duration::from_millis(500);
    limits.body_pause = Duration::from_millis(500);
    limits.stall = Duration::from_secs(2);
    setup
}

async fn nothing_was_placed(world: &mut World, after: &str) {
    world.settles().await;
    if let Ok((_, saw)) = world.agents[0].saw.try_recv() {
        panic!("{after}: the worker saw {saw:?}");
    }
    assert_eq!(world.chat(true).await.status, 200, "the next request works");
    world.agents[0].is_placed().await;
    while world.agents[0].saw.try_recv().is_ok() {}
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hostile_inputs_are_refused_and_reach_no_worker() {
    let inputs = corpus(include_str!("corpus/http1.txt"));
    let h2 = corpus(include_str!("corpus/http2.txt"));
    assert!(
        inputs.len() + h2.len() >= 300,
        "{}",
        inputs.len() + h2.len()
    );
    let mut world = World::new(hurried()).await;
    nothing_was_placed(&mut world, "the beginning").await;
    let before = resident_bytes();
    let address = world.bound.listen;
    let began = Instant::now();

    let mut seen: BTreeMap<String, u32> = BTreeMap::new();
    // A few at a time; when one reaches the worker, those of its group are to blame.
    let at_once = Arc::new(Semaphore::new(8));
    for group in inputs.chunks(32) {
        let running: Vec<_> = group
            .iter()
            .map(|input| {
                let (name, text) = (input.name, input.text);
                let at_once = at_once.clone();
                tokio::spawn(async move {
                    let _turn = at_once.acquire().await.unwrap();
                    (name, ends(address, text).await)
                })
            })
            .collect();
        for ended in running {
            let (name, end) = ended.await.unwrap();
            let good = matches!(end, End::Closed | End::Status(400..=499));
            assert!(good, "{name}: {end:?}");
            *seen.entry(format!("{end:?}")).or_insert(0) += 1;
        }
        let names: Vec<_> = group.iter().map(|input| input.name).collect();
        nothing_was_placed(&mut world, &names.join(" ")).await;
    }
    for input in &h2 {
        let mut stream = TcpStream::connect(address).await.unwrap();
        let talking = async {
            send(&mut stream, input.text).await;
            let mut read = [0; 4_096];
            while let Ok(1..) = stream.read(&mut read).await {}
        };
        // An h2 connection may stay open when only a stream was refused.
        let _ = timeout(Duration::from_millis(300), talking).await;
        drop(stream);
        nothing_was_placed(&mut world, input.name).await;
    }
    let growth = resident_bytes().saturating_sub(before);
    let (count, took) = (inputs.len() + h2.len(), began.elapsed());
    eprintln!(
        "{count} inputs in {took:?}, {} KiB more resident: {seen:?}",
        growth >> 10
    );
    // A corpus that is closed on before it is looked at would prove nothing.
    for wanted in [400, 404, 405, 408, 413] {
        let count = seen.get(&format!("Status({wanted})")).copied();
        assert!(count > Some(2), "{wanted}: {seen:?}");
    }
    assert!(growth <= MAX_GROWTH_BYTES, "{growth} bytes more");
}
