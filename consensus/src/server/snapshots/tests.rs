//! Pieces one by one, and over real links.

use forebay_link::{Alpn, Authority, CredentialPaths, Credentials, Endpoint, Expect};
use forebay_proto::Role;
use proptest::prelude::*;

use super::*;

fn carrying(data: Bytes) -> proto::Message {
    proto::Message {
        msg_type: 7,
        to: 2,
        from: 1,
        term: 3,
        snapshot: Some(proto::Snapshot {
            index: 9,
            term: 3,
            data,
            ..proto::Snapshot::default()
        }),
        ..proto::Message::default()
    }
}

/// A state in which every place is different.
fn state(bytes: usize) -> Bytes {
    (0..bytes).map(|at| (at * 31 + at / 251) as u8).collect()
}

fn take(frames: impl IntoIterator<Item = Frame>) -> Result<proto::Message, Refused> {
    let mut frames = frames.into_iter();
    let mut partial = Partial::begin(&frames.next().unwrap())?;
    for frame in frames {
        match frame.kind {
            Kind::SnapshotPiece => partial.take(&frame.payload)?,
            _ => return partial.end(&frame),
        }
    }
    Err(Refused::Lost("no end".into()))
}

#[test]
fn a_snapshot_is_what_its_pieces_were() {
    for bytes in [0, 1, 99, 100, 101, 1_000] {
        let message = carrying(state(bytes));
        let frames: Vec<_> = pieces(message.clone(), 100).collect();
        assert_eq!(frames.len(), bytes.div_ceil(100) + 2);
        assert_eq!(take(frames), Ok(message));
    }
}

type Damage = fn(&mut Vec<Frame>);

#[test]
fn what_was_not_announced_or_was_damaged_is_refused() {
    let frames = || -> Vec<Frame> { pieces(carrying(state(300)), 100).collect() };
    let announced = 300;
    let cases: [(Damage, Refused); 6] = [
        (
            |it| drop(it.remove(2)),
            Refused::TooShort {
                found: 200,
                announced,
            },
        ),
        (
            |it| it.insert(1, it[1].clone()),
            Refused::TooMuch { announced },
        ),
        (|it| it.swap(1, 2), Refused::Checksum),
        (
            |it| {
                let mut bytes = it[3].payload.to_vec();
                bytes[7] ^= 1;
                it[3].payload = bytes.into();
            },
            Refused::Checksum,
        ),
        (
            |it| it[1].payload = Bytes::new(),
            Refused::Malformed(Kind::SnapshotPiece),
        ),
        (
            |it| it[0].payload = Bytes::from_static(b"\xff"),
            Refused::Malformed(Kind::SnapshotHead),
        ),
    ];
    for (damage, expected) in cases {
        let mut damaged = frames();
        damage(&mut damaged);
        assert_eq!(take(damaged), Err(expected));
    }
    let bytes = MAX_SNAPSHOT_BYTES as u64 + 1;
    let head = proto::SnapshotHead {
        message: Some(carrying(Bytes::new())),
        bytes,
    };
    let head = Frame::message(Kind::SnapshotHead, &head);
    assert_eq!(take([head]), Err(Refused::TooLarge { bytes }));
}

proptest! {
    #[test]
    fn no_frames_panic_or_hold_more_than_was_sent(
        frames in prop::collection::vec((0..3usize, prop::collection::vec(any::<u8>(), 0..200)), 1..20),
        announced in any::<u64>(),
        honest in any::<bool>(),
    ) {
        let head = proto::SnapshotHead { message: Some(carrying(Bytes::new())), bytes: announced };
        let head = Frame::message(Kind::SnapshotHead, &head);
        let kinds = [Kind::SnapshotHead, Kind::SnapshotPiece, Kind::SnapshotEnd];
        let mut all: Vec<_> = frames.into_iter().map(|(kind, bytes)| Frame::new(kinds[kind], bytes.into())).collect();
        if honest {
            all.insert(0, head);
        }
        let sent: usize = all.iter().map(|frame| frame.payload.len()).sum();
        if let Ok(mut partial) = Partial::begin(&all[0]) {
            for frame in &all[1..] {
                let _ = partial.take(&frame.payload);
                prop_assert!(partial.data.capacity() <= 2 * sent + 64);
            }
            let _ = partial.end(&all[all.len() - 1]);
        }
    }
}

/// Two control nodes' endpoints, and a link from the first to the second seen from both ends.
struct Pair {
    _dir: tempfile::TempDir,
    _ends: [Endpoint; 2],
    to: Link,
    at: Link,
}

async fn pair(takes_pieces: bool) -> Pair {
    let dir = tempfile::tempdir().unwrap();
    let authority = Authority::create("test", 9).unwrap();
    authority.save(dir.path()).unwrap();
    let end = |name: &str| {
        let own = dir.path().join(name);
        let issued = authority.issue(Role::Control, name, 30).unwrap();
        let (cert, key) = issued.save(&own).unwrap();
        let ca = dir.path().join("ca.pem");
        let credentials = Credentials::load(&CredentialPaths { ca, cert, key }).unwrap();
        Endpoint::bind(([127, 0, 0, 1], 0).into(), &credentials, &[Alpn::Raft]).unwrap()
    };
    let ends = [end("c1"), end("c2")];
    ends[1].update_hello(|hello| hello.takes_snapshot_pieces = takes_pieces);
    let address = ends[1].local_addr().unwrap().to_string();
    let expect = Expect::named(Role::Control, "c2");
    let (to, at) = tokio::join!(
        ends[0].connect(&address, Alpn::Raft, &expect, Duration::from_secs(3)),
        ends[1].accept(),
    );
    let (to, at) = (to.unwrap(), at.unwrap());
    Pair {
        _dir: dir,
        _ends: ends,
        to,
        at,
    }
}

fn quick() -> Pace {
    Pace {
        patience: Duration::from_millis(300),
        ..Pace::default()
    }
}

fn outbound(pace: Pace) -> Outbound {
    Outbound {
        pace,
        ..Outbound::default()
    }
}

/// A message that raft-rs would send, and the same as it arrives.
fn large(bytes: usize) -> (Message, proto::Message) {
    let arrives = carrying(state(bytes));
    (wire::from_wire(arrives.clone()).unwrap(), {
        let mut arrives = arrives;
        if let Some(snapshot) = &mut arrives.snapshot {
            snapshot.conf_state = Some(proto::ConfState::default());
        }
        arrives
    })
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_snapshot_arrives_in_pieces_and_whole_at_an_older_version() {
    for takes_pieces in [true, false] {
        let pair = pair(takes_pieces).await;
        let (message, expected) = large(3 << 20);
        let (inbound, at) = (Inbound::default(), pair.at.clone());
        let receiving = tokio::spawn(async move {
            let mut stream = at.accept_one_way().await.unwrap();
            let first = stream.recv().await.unwrap().unwrap();
            let arrived = match first.kind {
                Kind::Raft => (first.kind, first.decode().unwrap()),
                kind => (kind, inbound.receive(&mut stream, &first).await.unwrap()),
            };
            // To its end, which is how the sender knows.
            assert!(stream.recv().await.unwrap().is_none());
            arrived
        });
        let sent = outbound(Pace::default()).send(&pair.to, message).await;
        let (kind, arrived) = receiving.await.unwrap();
        assert_eq!(kind == Kind::SnapshotHead, takes_pieces);
        assert_eq!(arrived, expected);
        assert_eq!(sent, Some(()));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_peer_that_stalls_is_given_up_and_so_is_one_that_sends_no_more() {
    let pair = pair(true).await;
    // It takes the stream and reads nothing.
    let at = pair.at.clone();
    let holding = tokio::spawn(async move {
        let stream = at.accept_one_way().await.unwrap();
        tokio::time::sleep(Duration::from_secs(2)).await;
        drop(stream);
    });
    let began = std::time::Instant::now();
    let sent = outbound(quick()).send(&pair.to, large(3 << 20).0).await;
    assert_eq!(sent, None);
    assert!(
        began.elapsed() < Duration::from_millis(1_500),
        "{:?}",
        began.elapsed()
    );
    holding.await.unwrap();

    // The head comes, and then nothing.
    let mut stream = pair.to.open_one_way().unwrap();
    let frames: Vec<_> = pieces(carrying(state(1_000)), 100).collect();
    stream.send(&frames[0]).await.unwrap();
    let inbound = Inbound {
        patience: Duration::from_millis(200),
        ..Inbound::default()
    };
    let mut receiver = pair.at.accept_one_way().await.unwrap();
    let head = receiver.recv().await.unwrap().unwrap();
    assert_eq!(
        inbound.receive(&mut receiver, &head).await,
        Err(Refused::Stalled)
    );
    assert_eq!(
        stream.stopped().await,
        Some(u64::from(Code::Protocol as u32))
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_newer_snapshot_takes_the_place_of_one_that_is_not_whole() {
    let pair = pair(true).await;
    let frames: Vec<_> = pieces(carrying(state(1_000)), 100).collect();
    let inbound = Inbound::default();
    let mut senders = Vec::new();
    let mut receiving = Vec::new();
    for _ in 0..2 {
        let mut stream = pair.to.open_one_way().unwrap();
        stream.send(&frames[0]).await.unwrap();
        let mut receiver = pair.at.accept_one_way().await.unwrap();
        let inbound = inbound.clone();
        let head = receiver.recv().await.unwrap().unwrap();
        let (begun, seen) = tokio::sync::oneshot::channel();
        receiving.push(tokio::spawn(async move {
            let receive = inbound.receive(&mut receiver, &head);
            begun.send(()).unwrap();
            receive.await
        }));
        seen.await.unwrap();
        tokio::time::sleep(Duration::from_millis(20)).await;
        senders.push(stream);
    }
    for frame in &frames[1..] {
        senders[1].send(frame).await.unwrap();
    }
    let newer = receiving.pop().unwrap().await.unwrap();
    let older = receiving.pop().unwrap().await.unwrap();
    assert_eq!((older, newer.is_ok()), (Err(Refused::Overtaken), true));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn more_snapshots_than_the_quota_wait_for_their_turn() {
    let pair = pair(true).await;
    let outbound = outbound(quick());
    let _turns = outbound.turns.clone().acquire_many_owned(2).await.unwrap();
    let waiting = outbound.send(&pair.to, large(1_000).0);
    assert!(timeout(Duration::from_millis(100), waiting).await.is_err());
    let stream = timeout(Duration::from_millis(100), pair.at.accept_one_way()).await;
    assert!(stream.is_err(), "no stream is opened before");
}
