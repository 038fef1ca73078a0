//! What a client cannot do: stay silent, take nothing, or open connections without end.
#![allow(clippy::unwrap_used, clippy::panic)] // a test's helpers fail as its assertions do
#![allow(clippy::disallowed_methods)] // tests of the shell run in real time

mod common;

use std::time::{Duration, Instant};

use bytes::Bytes;
use common::{Act, Saw, Setup, WHOLE, World};
use forebay_balancer::Limits;
use http_body_util::{BodyExt, Full};
use hyper::Request;
use hyper::client::conn::http2::{SendRequest, handshake};
use hyper_util::rt::{TokioExecutor, TokioIo};

const SHORT: Duration = Duration::from_millis(300);
/// Long after `SHORT`, long before the defaults.
const SOON: Duration = Duration::from_secs(5);

async fn connect(world: &World) -> SendRequest<Full<Bytes>> {
    let stream = tokio::net::TcpStream::connect(world.bound.listen).await;
    let io = TokioIo::new(stream.unwrap());
    let (sender, connection) = handshake(TokioExecutor::new(), io).await.unwrap();
    tokio::spawn(connection);
    sender
}

fn chat(world: &World, streaming: bool) -> Request<Full<Bytes>> {
    let body = format!("{{\"model\":\"m\",\"stream\":{streaming}}}");
    Request::post(format!("http://{}/v1/chat/completions", world.bound.listen))
        .body(Full::from(body))
        .unwrap()
}

async fn world(change: impl FnOnce(&mut Limits)) -> World {
    let mut setup = Setup::default();
    change(&mut setup.settings.limits);
    World::new(setup).await
}

#[tokio::test]
async fn a_client_that_takes_no_byte_is_cut_off_and_its_request_cancelled() {
    let mut world = world(|limits| limits.stall = SHORT).await;
    world.next(&[Act::Flood]);
    let mut client = world.client().await;
    client.chat(true).await;
    let began = Instant::now();
    world.agents[0].sees(&Saw::Cancelled).await;
    assert!(began.elapsed() < SOON, "{:?}", began.elapsed());
    world.settles().await;
    world
        .until("/metrics", |_, text| {
            text.contains("forebay_balancer_connections 0\n")
        })
        .await;
    drop(client);
}

#[tokio::test]
async fn an_h2_stream_that_takes_nothing_is_cut_off_and_its_connection_serves_on() {
    let mut world = world(|limits| limits.stall = SHORT).await;
    let mut sender = connect(&world).await;
    world.next(&[Act::Flood]);
    let unread = sender.send_request(chat(&world, true)).await.unwrap();
    let began = Instant::now();
    world.agents[0].sees(&Saw::Cancelled).await;
    assert!(began.elapsed() < SOON, "{:?}", began.elapsed());
    world.settles().await;
    world
        .until("/metrics", |_, text| {
            text.contains("forebay_balancer_requests_total{outcome=\"stalled\"} 1\n")
        })
        .await;
    let broken = unread.into_body().collect().await;
    assert!(broken.is_err(), "what was cut off does not look complete");
    let answer = sender.send_request(chat(&world, false)).await.unwrap();
    let body = answer.into_body().collect().await.unwrap().to_bytes();
    assert_eq!(body, WHOLE.as_bytes());
}

#[tokio::test]
async fn an_h2_connection_that_nobody_uses_ends_and_one_that_is_used_does_not() {
    let world = world(|limits| limits.idle = SHORT).await;
    let mut sender = connect(&world).await;
    world.next(&[Act::Slow(SHORT * 4)]);
    let answer = sender.send_request(chat(&world, false)).await.unwrap();
    let body = answer.into_body().collect().await.unwrap().to_bytes();
    assert_eq!(body, WHOLE.as_bytes());
    let closed = async {
        while !sender.is_closed() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(SOON, closed).await.unwrap();
}

#[tokio::test]
async fn connections_beyond_the_limit_are_told_so_and_room_is_used_again() {
    let world = world(|limits| limits.connections = 1).await;
    let first = world.client().await;
    world
        .until("/metrics", |_, text| {
            text.contains("forebay_balancer_connections 1\n")
        })
        .await;
    let mut second = world.client().await;
    let answer = second.answer().await;
    assert_eq!(answer.code(), (503, "no_capacity".into()));
    assert!(answer.head.has("retry-after: "));
    assert!(second.is_closed().await);
    drop(first);
    world
        .until("/metrics", |_, text| {
            text.contains("forebay_balancer_connections 0\n")
        })
        .await;
    assert_eq!(world.chat(false).await.body, WHOLE);
}

#[tokio::test]
async fn a_connection_that_does_not_say_what_it_speaks_is_closed() {
    let world = world(|limits| limits.first_bytes = SHORT).await;
    for said in ["", "P", "PRI * HTTP/2.0\r\n\r\nS"] {
        let began = Instant::now();
        let mut client = world.client().await;
        client.send(said).await;
        assert!(client.is_closed().await, "{said:?}");
        let took = began.elapsed();
        assert!((SHORT..SOON).contains(&took), "{said:?}: {took:?}");
    }
    // One that says it in time has as long as requests take.
    let mut client = world.client().await;
    world.next(&[Act::Slow(SHORT * 2)]);
    client.chat(false).await;
    assert_eq!(client.answer().await.body, WHOLE);
}

#[tokio::test]
async fn a_head_has_to_become_whole_and_the_pause_before_it_is_the_clients() {
    let world = world(|limits| limits.header = SHORT).await;
    let mut client = world.client().await;
    for _ in 0..2 {
        client.chat(false).await;
        assert_eq!(client.answer().await.body, WHOLE);
        tokio::time::sleep(SHORT * 2).await;
    }
    let began = Instant::now();
    client.send("POST /v1/chat/completions HTTP/1.1\r\n").await;
    assert!(client.is_closed().await);
    let took = began.elapsed();
    assert!((SHORT..SOON).contains(&took), "{took:?}");
}

#[tokio::test]
async fn an_http1_connection_that_nobody_uses_ends() {
    let world = world(|limits| limits.idle = SHORT).await;
    let mut client = world.client().await;
    world.next(&[Act::Slow(SHORT * 4)]);
    client.chat(false).await;
    assert_eq!(client.answer().await.body, WHOLE);
    let began = Instant::now();
    assert!(client.is_closed().await);
    let took = began.elapsed();
    assert!((SHORT..SOON).contains(&took), "{took:?}");
}
