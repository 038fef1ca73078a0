//! The same over h2c, where many requests share a connection.
#![allow(clippy::unwrap_used, clippy::panic)] // a test's helpers fail as its assertions do
#![allow(clippy::disallowed_methods)] // tests of the shell run in real time

mod common;

use std::time::{Duration, Instant};

use bytes::Bytes;
use common::{Act, EVENT, REST, Saw, WHOLE, World};
use http_body_util::{BodyExt, Full};
use hyper::Request;
use hyper::client::conn::http2::{SendRequest, handshake};
use hyper_util::rt::{TokioExecutor, TokioIo};

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

#[tokio::test]
async fn requests_share_a_connection_and_one_that_stalls_holds_up_no_other() {
    let world = World::with(1).await;
    let mut sender = connect(&world).await;
    world.next(&[Act::Flood]);
    let unread = sender.send_request(chat(&world, true)).await.unwrap();
    for (streaming, expected) in [(false, WHOLE.to_owned()), (true, format!("{EVENT}{REST}"))] {
        let answer = sender.send_request(chat(&world, streaming)).await.unwrap();
        assert_eq!(answer.status(), 200);
        assert!(answer.headers().contains_key("x-request-id"));
        let body = answer.into_body().collect().await.unwrap().to_bytes();
        assert_eq!(body, expected.as_bytes());
    }
    drop(unread);
    world.settles().await;
}

#[tokio::test]
async fn a_stream_that_is_reset_cancels_its_request_within_100_ms() {
    for act in [Act::Hang, Act::HangAfterFirst] {
        let mut world = World::with(1).await;
        let mut sender = connect(&world).await;
        world.next(std::slice::from_ref(&act));
        let request = chat(&world, true);
        let asking = tokio::spawn(async move {
            let answer = sender.send_request(request).await.unwrap();
            answer.into_body().collect().await
        });
        world.agents[0].is_placed().await;
        tokio::time::sleep(Duration::from_millis(100)).await;
        let left = Instant::now();
        asking.abort();
        let took = world.agents[0].sees(&Saw::Cancelled).await - left;
        assert!(took < Duration::from_millis(100), "{act:?}: {took:?}");
        world.settles().await;
    }
}
