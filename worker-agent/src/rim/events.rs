//! Follows an engine's events of its cache: a subscription, and a socket on which it tells again what was
//! missed.

use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use forebay_link::Backoff;
use rand::SeedableRng;
use rand::rngs::StdRng;
use zeromq::{
    DealerSocket, Socket, SocketEvent, SocketOptions, SocketRecv, SocketSend, SubSocket, ZmqError,
    ZmqMessage,
};

use super::found;
use super::sources::{LocalEndpoint, Sources};
use super::work::Shared;
use crate::core::kv::Batch;

/// How long a socket may take to be there.
const CONNECT: Duration = Duration::from_secs(5);
/// From one look at what is missing or overdue to the next.
const LOOK: Duration = Duration::from_millis(50);
/// What marks the end of what is told again.
const END: &[u8] = &[0xff; 8];

/// Follows for as long as it is polled.
pub(super) async fn follow(shared: Arc<Shared>, sources: Sources) {
    let mut rng = StdRng::from_os_rng();
    let mut backoff = Backoff::new(Duration::from_millis(50), Duration::from_secs(2));
    let mut said = false;
    loop {
        let connected = || {
            tracing::info!(events = %sources.events, "the engine's cache events are followed");
        };
        let problem = match session(&shared, &sources, connected).await {
            (problem, true) => {
                backoff.reset();
                said = false;
                problem
            }
            (problem, false) => problem,
        };
        interrupted(&shared);
        if !std::mem::replace(&mut said, true) {
            tracing::warn!(events = %sources.events, %problem, "the link to the engine's cache events is gone, and made anew");
        }
        tokio::time::sleep(backoff.next(&mut rng)).await;
    }
}

fn interrupted(shared: &Shared) {
    shared.with(|core, _| core.events(|exact| exact.interrupted()));
}

/// Follows over one pair of sockets; returns why it ended, and whether it ever began.
async fn session(shared: &Shared, sources: &Sources, connected: impl FnOnce()) -> (ZmqError, bool) {
    let opened = async {
        let mut events = SubSocket::with_options(options());
        // Which tells of a peer that is gone; the socket itself goes on in silence.
        let monitor = events.monitor();
        events.subscribe("").await?;
        open(&mut events, &sources.events).await?;
        let mut again = None;
        if let Some(endpoint) = &sources.replay {
            let mut socket = DealerSocket::with_options(options());
            open(&mut socket, endpoint).await?;
            again = Some(socket);
        }
        Ok::<_, ZmqError>((events, monitor, again))
    };
    let (mut events, mut monitor, mut again) = match opened.await {
        Ok(opened) => opened,
        Err(problem) => return (problem, false),
    };
    // Behind the sockets it may be another process than the one that the map is of, and one that has said
    // little is not told from one that has nothing new to say.
    interrupted(shared);
    let gauges = found::gauges(&shared.engine, shared.patience.look).await;
    let process = gauges.and_then(|gauges| found::process(&shared.engine, &gauges));
    let Some(process) = process else {
        let problem = "the engine does not say which process it is";
        return (ZmqError::Other(problem), false);
    };
    shared.engine_is(Some(process));
    connected();
    loop {
        let asked = shared.with(|core, now| {
            core.events(|exact| {
                exact.pass(now);
                exact.ask(now)
            })
        });
        if let (Some(from), Some(again)) = (asked.flatten(), &mut again) {
            let frames = vec![Bytes::new(), Bytes::copy_from_slice(&from.to_be_bytes())];
            let request = ZmqMessage::try_from(frames).expect("it has frames");
            if let Err(problem) = again.send(request).await {
                return (problem, true);
            }
        }
        let told = async {
            match &mut again {
                Some(again) => again.recv().await,
                None => std::future::pending().await,
            }
        };
        let gone = async {
            loop {
                match next(&mut monitor).await {
                    Some(SocketEvent::Disconnected(_) | SocketEvent::Closed) => return,
                    Some(_) => {}
                    None => std::future::pending().await,
                }
            }
        };
        let message = tokio::select! {
            message = events.recv() => message.map(|message| (message, false)),
            message = told => message.map(|message| (message, true)),
            () = gone => Err(ZmqError::NoMessage),
            () = tokio::time::sleep(LOOK) => continue,
        };
        match message {
            Ok((message, false)) => live(shared, message),
            Ok((message, true)) => replayed(shared, message),
            Err(problem) => return (problem, true),
        }
    }
}

async fn next<S: futures::Stream + Unpin>(stream: &mut S) -> Option<S::Item> {
    std::future::poll_fn(|cx| std::pin::Pin::new(&mut *stream).poll_next(cx)).await
}

fn options() -> SocketOptions {
    let mut options = SocketOptions::default();
    options.connect_timeout(CONNECT);
    options
}

async fn open(socket: &mut impl Socket, endpoint: &LocalEndpoint) -> Result<(), ZmqError> {
    if endpoint.listens() {
        return socket.bind(endpoint.address()).await.map(drop);
    }
    socket.connect(endpoint.address()).await
}

/// Topic, number, payload; a release that has no topics leaves the first out.
fn live(shared: &Shared, message: ZmqMessage) {
    let Some((seq, payload)) = numbered(message) else {
        return shared.metrics().unreadable();
    };
    match Batch::decode(&payload) {
        Ok(batch) => {
            shared.metrics().lag(lag(batch.at));
            shared.with(|core, _| core.events(|exact| exact.live(seq, batch)));
        }
        Err(problem) => {
            tracing::debug!(seq, %problem, "a batch of cache events");
            shared.metrics().unreadable();
            shared.with(|core, _| core.events(|exact| exact.garbled(seq, false)));
        }
    }
}

/// The same behind an empty frame, or the mark of the end.
fn replayed(shared: &Shared, message: ZmqMessage) {
    let Some((seq, payload)) = numbered(message) else {
        return shared.metrics().unreadable();
    };
    if payload.is_empty() && seq.to_be_bytes() == END {
        shared.with(|core, _| core.events(|exact| exact.replay_end()));
        return;
    }
    let decoded = Batch::decode(&payload);
    if decoded.is_err() {
        shared.metrics().unreadable();
    }
    shared.with(|core, now| {
        core.events(|exact| match decoded {
            Ok(batch) => exact.replayed(now, seq, batch),
            Err(_) => exact.garbled(seq, true),
        })
    });
}

/// The last frame, and the number in the last but one.
fn numbered(message: ZmqMessage) -> Option<(u64, Bytes)> {
    let mut frames = message.into_vec();
    let payload = frames.pop()?;
    let number = frames.pop()?;
    let number = u64::from_be_bytes(number.as_ref().try_into().ok()?);
    Some((number, payload))
}

/// From the engine's writing to here, in seconds, by the host's clock.
fn lag(at: f64) -> f64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    (now.unwrap_or_default().as_secs_f64() - at).max(0.0)
}
