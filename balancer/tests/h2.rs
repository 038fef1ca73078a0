//! The same over h2c, where many requests share a connection.
#![allow(clippy::unwrap_used, clippy::panic)] // a test's helpers fail as its assertions do
#![allow(clippy::disallowed_methods)] // tests of the shell run in real time

mod common;

use std::time::{Duration, Instant};

use bytes::Bytes;
use common::{Act, EVENT, REST, Saw, Setup, WHOLE, World, promptly};
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
    for (streaming, act) in [
        (true, Act::Hang),
        (false, Act::Hang),
        (true, Act::HangAfterFirst),
        (true, Act::Flood),
    ] {
        eprintln!("{act:?}, streaming: {streaming}");
        promptly(Duration::from_millis(100), async || {
            let mut world = World::with(1).await;
            let mut sender = connect(&world).await;
            world.next(std::slice::from_ref(&act));
            let request = chat(&world, streaming);
            let asking = tokio::spawn(async move {
                let answer = sender.send_request(request).await.unwrap();
                answer.into_body().collect().await
            });
            world.agents[0].is_placed().await;
            tokio::time::sleep(Duration::from_millis(100)).await;
            let left = Instant::now();
            asking.abort();
            // The connection stays: only the stream is reset.
            let cancelled = world.agents[0].sees(&Saw::Cancelled).await;
            world.settles().await;
            cancelled - left
        })
        .await;
    }
}

#[tokio::test]
async fn a_stream_that_is_reset_while_it_waits_leaves_the_queue() {
    let world = World::new(Setup {
        slots: 1,
        ..Setup::default()
    })
    .await;
    let mut sender = connect(&world).await;
    world.next(&[Act::HangAfterFirst]);
    let running = sender.send_request(chat(&world, true)).await.unwrap();
    let request = chat(&world, false);
    let mut second = sender.clone();
    let waiting = tokio::spawn(async move { second.send_request(request).await.map(drop) });
    let queued = |count| move |_: u16, text: &str| text.contains(&format!("\"queued\":{count}"));
    world.until("/debug/bookings", queued(1)).await;
    waiting.abort();
    world.until("/debug/bookings", queued(0)).await;
    drop(running);
    world.settles().await;
    let answer = sender.send_request(chat(&world, false)).await.unwrap();
    let body = answer.into_body().collect().await.unwrap().to_bytes();
    assert_eq!(body, WHOLE.as_bytes());
}

#[tokio::test]
async fn a_held_back_head_pings_events_and_failures_are_as_over_http_1() {
    let mut setup = Setup::default();
    setup.settings.hold_headers_ms = 100;
    let world = World::new(setup).await;
    let mut sender = connect(&world).await;
    world.next(&[
        Act::Slow(Duration::from_millis(1_500)),
        Act::BreakAfterFirst,
        Act::Status(400, "{\"error\":{}}"),
    ]);
    let began = Instant::now();
    let answer = sender.send_request(chat(&world, true)).await.unwrap();
    assert_eq!(answer.status(), 200);
    assert!(began.elapsed() < Duration::from_millis(1_400));
    let mut body = answer.into_body();
    let mut pieces = Vec::new();
    while let Some(frame) = body.frame().await {
        pieces.push(String::from_utf8(frame.unwrap().into_data().unwrap().to_vec()).unwrap());
    }
    // Each as it came, none waiting for the next.
    assert_eq!(pieces[..2], [": ping\n\n", EVENT], "{pieces:?}");
    assert_eq!(pieces[2..].concat(), REST);

    let answer = sender.send_request(chat(&world, true)).await.unwrap();
    let body = answer.into_body().collect().await.unwrap().to_bytes();
    let text = String::from_utf8(body.to_vec()).unwrap();
    assert!(
        text.contains("upstream_error") && !text.contains("[DONE]"),
        "{text}"
    );

    let answer = sender.send_request(chat(&world, true)).await.unwrap();
    assert_eq!(answer.status(), 400);
}
