//! Links over real QUIC on loopback: who is let in, what arrives, what a death looks like.

#![allow(clippy::unwrap_used, clippy::panic)] // a test's helpers fail as its assertions do
use std::net::SocketAddr;
use std::path::Path;
use std::time::{Duration, Instant};

use bytes::Bytes;
use forebay_link::{
    Alpn, Authority, ConnectError, CredentialPaths, Credentials, Endpoint, Expect, LinkClosed,
    RecvError,
};
use forebay_proto::Role;
use forebay_proto::frame::{Frame, Kind};

const PATIENCE: Duration = Duration::from_secs(3);

fn credentials(dir: &Path, authority: &Authority, role: Role, name: &str) -> Credentials {
    let own = dir.join(format!("{}-{name}", authority.trust_domain()));
    if !own.join("ca.pem").exists() {
        authority.save(&own).unwrap();
    }
    let (cert, key) = authority.issue(role, name, 30).unwrap().save(&own).unwrap();
    Credentials::load(&CredentialPaths {
        ca: own.join("ca.pem"),
        cert,
        key,
    })
    .unwrap()
}

fn loopback() -> SocketAddr {
    ([127, 0, 0, 1], 0).into()
}

struct World {
    dir: tempfile::TempDir,
    authority: Authority,
}

impl World {
    fn new() -> Self {
        let authority = Authority::create("test", 1).unwrap();
        Self {
            dir: tempfile::tempdir().unwrap(),
            authority,
        }
    }

    fn credentials(&self, role: Role, name: &str) -> Credentials {
        credentials(self.dir.path(), &self.authority, role, name)
    }

    fn agent(&self) -> (Endpoint, String) {
        let agent = Endpoint::bind(
            loopback(),
            &self.credentials(Role::Agent, "w1"),
            &[Alpn::Work],
        );
        let agent = agent.unwrap();
        let address = agent.local_addr().unwrap().to_string();
        (agent, address)
    }
}

#[test]
fn a_certificate_says_how_long_it_holds_and_whether_the_ca_signed_it() {
    let world = World::new();
    let ours = world.credentials(Role::Agent, "w9");
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    let now = now.unwrap();
    let days = |until: i64| (until - i64::try_from(now.as_secs()).unwrap()) / 86_400;
    assert!((29..=30).contains(&days(ours.validity().until)));
    assert!(days(ours.authority_validity().until) > 3_000);
    assert_eq!(ours.check_chain(now), Ok(()));
    let later = now + Duration::from_secs(40 * 86_400);
    assert!(ours.check_chain(later).unwrap_err().contains("expired"));
    // The same cell and salt, and another key: the names agree, the signature does not.
    let other = Authority::create("test", 1).unwrap();
    let dir = world.dir.path().join("other");
    other.save(&dir).unwrap();
    let own = world.dir.path().join("test.00000001-w9");
    let mixed = Credentials::load(&CredentialPaths {
        ca: dir.join("ca.pem"),
        cert: own.join("w9.pem"),
        key: own.join("w9-key.pem"),
    });
    assert!(mixed.unwrap().check_chain(now).is_err());
}

#[tokio::test]
async fn frames_arrive_both_ways_and_an_end_is_an_end() {
    let world = World::new();
    let (agent, address) = world.agent();
    agent.update_hello(|hello| hello.build = "the agent".into());
    let balancer = Endpoint::client(&world.credentials(Role::Balancer, "b1")).unwrap();
    let expect = Expect::named(Role::Agent, "w1");
    let out = balancer
        .connect(&address, Alpn::Work, &expect, PATIENCE)
        .await
        .unwrap();
    assert_eq!(
        (out.peer().short().as_str(), out.hello().build.as_str()),
        ("agent/w1", "the agent")
    );
    let inward = agent.accept().await.unwrap();
    assert_eq!(inward.peer().short(), "balancer/b1");

    let (mut send, mut recv) = out.open().unwrap();
    send.send(&Frame::new(Kind::Body, Bytes::from_static(b"hello")))
        .await
        .unwrap();
    send.finish();
    let (mut answer, mut asked) = inward.accept().await.unwrap();
    assert_eq!(asked.recv().await.unwrap().unwrap().payload, "hello");
    assert_eq!(asked.recv().await, Ok(None));
    // More than a stream's window: it arrives as it is read.
    let large = Frame::new(Kind::Data, Bytes::from(vec![7; 200_000]));
    let (sent, received) = tokio::join!(answer.send(&large), recv.recv());
    sent.unwrap();
    assert_eq!(received.unwrap().unwrap().payload.len(), 200_000);
    drop(answer);
    assert!(
        matches!(recv.recv().await, Err(RecvError::Reset(_))),
        "a dropped sender is no end"
    );

    let load = Frame::new(Kind::Load, Bytes::from_static(b"load"));
    assert!(inward.send_datagram(&load));
    assert_eq!(out.read_datagram().await, Ok(load));
}

#[tokio::test]
async fn a_dial_that_began_before_its_peer_was_there_reaches_it_soon_after_it_starts() {
    let world = World::new();
    let own = world.credentials(Role::Agent, "w1");
    let free = std::net::UdpSocket::bind(loopback()).unwrap();
    let address = free.local_addr().unwrap().to_string();
    drop(free);
    let balancer = Endpoint::client(&world.credentials(Role::Balancer, "b1")).unwrap();
    let expect = Expect::named(Role::Agent, "w1");
    let to = address.clone();
    let dial = tokio::spawn(async move {
        balancer
            .connect(&to, Alpn::Work, &expect, PATIENCE)
            .await
            .map(|_| Instant::now())
    });
    tokio::time::sleep(Duration::from_millis(150)).await;
    let agent = Endpoint::bind(address.parse().unwrap(), &own, &[Alpn::Work]);
    let (agent, started) = (agent.unwrap(), Instant::now());
    agent.accept().await.unwrap();
    let reached = dial.await.unwrap().unwrap().duration_since(started);
    assert!(reached < Duration::from_millis(500), "{reached:?}");
}

#[tokio::test]
async fn the_wrong_role_name_or_ca_is_turned_away_with_a_reason() {
    let world = World::new();
    let (_agent, address) = world.agent();
    let anyone = Expect::role(Role::Agent);

    let agent = Endpoint::client(&world.credentials(Role::Agent, "w2")).unwrap();
    let error = agent
        .connect(&address, Alpn::Work, &anyone, PATIENCE)
        .await
        .unwrap_err();
    assert!(
        matches!(&error, ConnectError::TurnedAway { reason, .. } if reason.contains("agent/w2 may not speak")),
        "{error}"
    );

    let balancer = Endpoint::client(&world.credentials(Role::Balancer, "b1")).unwrap();
    let other = Expect::named(Role::Agent, "w9");
    let error = balancer
        .connect(&address, Alpn::Work, &other, PATIENCE)
        .await
        .unwrap_err();
    assert!(
        matches!(&error, ConnectError::WrongPeer { found, .. } if found == "agent/w1"),
        "{error}"
    );
    let error = balancer
        .connect(&address, Alpn::Control, &anyone, PATIENCE)
        .await
        .unwrap_err();
    assert!(matches!(error, ConnectError::Handshake { .. }), "{error}");

    let stranger = Authority::create("test", 2).unwrap();
    let stranger = credentials(world.dir.path(), &stranger, Role::Balancer, "b1");
    let stranger = Endpoint::client(&stranger).unwrap();
    let error = stranger
        .connect(&address, Alpn::Work, &anyone, PATIENCE)
        .await
        .unwrap_err();
    assert!(matches!(error, ConnectError::Handshake { .. }), "{error}");
}

#[tokio::test]
async fn garbage_and_half_open_peers_do_not_stop_others() {
    let world = World::new();
    let (agent, address) = world.agent();
    let socket = tokio::net::UdpSocket::bind("127.0.0.1:0").await.unwrap();
    for size in [0, 1, 20, 1200, 1400] {
        for first in [0x00, 0x40, 0xc0, 0xff] {
            socket.send_to(&vec![first; size], &address).await.unwrap();
        }
    }
    let balancer = Endpoint::client(&world.credentials(Role::Balancer, "b1")).unwrap();
    let expect = Expect::role(Role::Agent);
    balancer
        .connect(&address, Alpn::Work, &expect, PATIENCE)
        .await
        .unwrap();
    assert!(agent.accept().await.is_some());
}

/// Links to an agent that was killed and started again, each of another balancer, and the time from
/// when all say something once until the last one is told.
fn resets(count: usize) -> (Vec<LinkClosed>, Duration) {
    let runtime = || {
        let mut builder = tokio::runtime::Builder::new_multi_thread();
        builder.enable_all().worker_threads(1).build().unwrap()
    };
    let world = World::new();
    let credentials = world.credentials(Role::Agent, "w1");
    let (ours, first) = (runtime(), runtime());
    let agent = {
        let _inside = first.enter();
        Endpoint::bind(loopback(), &credentials, &[Alpn::Work]).unwrap()
    };
    let address = agent.local_addr().unwrap();
    let own = world.credentials(Role::Balancer, "b1");
    let links = ours.block_on(async {
        let mut links = Vec::new();
        for _ in 0..count {
            let balancer = Endpoint::client(&own).unwrap();
            let (address, expect) = (address.to_string(), Expect::role(Role::Agent));
            let link = balancer.connect(&address, Alpn::Work, &expect, PATIENCE);
            links.push(link.await.unwrap());
        }
        links
    });
    // The tasks stop where they are and say no goodbye, as after kill -9.
    first.shutdown_timeout(PATIENCE);
    drop(agent);
    ours.block_on(async {
        let _again = Endpoint::bind(address, &credentials, &[Alpn::Work]).unwrap();
        let began = Instant::now();
        for link in &links {
            assert!(link.send_datagram(&Frame::new(Kind::Load, Bytes::new())));
        }
        let mut closed = Vec::new();
        for link in &links {
            let told = tokio::time::timeout(PATIENCE, link.closed());
            closed.push(told.await.expect("reset well before silence"));
        }
        (closed, began.elapsed())
    })
}

#[test]
fn a_restarted_peer_resets_the_connections_of_its_predecessor() {
    assert_eq!(resets(1).0, [LinkClosed::Reset]);
}

#[test]
fn all_who_speak_to_a_restarted_peer_at_once_are_told_at_once() {
    let (closed, took) = resets(40);
    assert!(closed.iter().all(|closed| *closed == LinkClosed::Reset));
    assert!(took < Duration::from_millis(300), "{took:?}");
}
