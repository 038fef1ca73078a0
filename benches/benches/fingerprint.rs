//! How long does it take to fingerprint a body of 400 KB?
//!
//! Three bodies: an agent's turn (code and tools), text in Chinese with every character escaped, and one
//! image. Beside each: the check that it is UTF-8, and a whole document tree by serde_json, in the same
//! run. The goal is 1 ms of one core for the agent's turn in a release build.

#![allow(clippy::print_stdout)] // its result

use std::hint::black_box;

use forebay_benches::{Timed, bodies};
use forebay_proto::FingerprintKey;
use forebay_scheduler::fingerprint::{Endpoint, RenderProfile, Root, Settings, read};

const RUNS: usize = 400;

fn main() {
    let key = FingerprintKey {
        epoch: 1,
        bytes: [7; 16],
    };
    let settings = Settings {
        key: &key,
        root: Root {
            pool: "default",
            model: "m",
            adapter: None,
            scope: "tenant",
        },
        profile: &RenderProfile::default(),
        chunk_bytes: 256,
    };
    println!(
        "{:<16} {:>8} {:>12} {:>12} {:>12} {:>12} {:>8}",
        "body", "KB", "p50", "p99", "utf-8 p50", "tree p50", "of tree"
    );
    for (name, body) in [
        ("agent's turn", bodies::agents_turn()),
        ("escaped Chinese", bodies::escaped_chinese()),
        ("image", bodies::image()),
    ] {
        let bytes = body.as_bytes();
        let ours = Timed::run(RUNS, || {
            black_box(read(Endpoint::Chat, black_box(bytes), &settings)).expect("it is a chat");
        });
        let utf8 = Timed::run(RUNS, || {
            black_box(std::str::from_utf8(black_box(bytes))).expect("it is text");
        });
        let tree = Timed::run(RUNS, || {
            let tree: serde_json::Value =
                serde_json::from_slice(black_box(bytes)).expect("it is JSON");
            black_box(tree);
        });
        let (p50, p99) = (ours.quantile(0.5), ours.quantile(0.99));
        let (utf8, tree) = (utf8.quantile(0.5), tree.quantile(0.5));
        let ratio = p50.as_secs_f64() / tree.as_secs_f64();
        let size = bytes.len() / 1_000;
        println!("{name:<16} {size:>8} {p50:>12?} {p99:>12?} {utf8:>12?} {tree:>12?} {ratio:>8.2}");
    }
}
