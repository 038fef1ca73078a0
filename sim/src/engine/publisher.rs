//! The sockets of the cache's events: what happened goes to whoever listens, and once more to whoever asks.
#![allow(clippy::disallowed_methods)] // a rim: sockets

use super::events::Batch;
use super::{EngineError, KvEvents};
use bytes::Bytes;
use std::collections::VecDeque;
use tokio::sync::mpsc;
use zeromq::{PubSocket, RouterSocket, Socket, SocketRecv, SocketSend, ZmqError, ZmqMessage};

/// Batches between the engine and its sockets; more are dropped, as vLLM drops them for who is slow.
pub(super) const QUEUE: usize = 100_000;
const TOPIC: &[u8] = b"kv@emulated";

/// The sockets, listening.
pub(super) struct Publisher {
    events: PubSocket,
    again: Option<RouterSocket>,
    kept: VecDeque<(u64, Bytes)>,
    buffer: usize,
}

impl Publisher {
    pub(super) async fn bind(settings: &KvEvents) -> Result<Publisher, EngineError> {
        let failed = |endpoint: &str, error: ZmqError| EngineError::Events {
            endpoint: endpoint.to_owned(),
            problem: error.to_string(),
        };
        let mut events = PubSocket::new();
        free(&settings.endpoint);
        let bound = events.bind(&settings.endpoint).await;
        bound.map_err(|error| failed(&settings.endpoint, error))?;
        let mut again = None;
        if let Some(endpoint) = &settings.replay {
            let mut socket = RouterSocket::new();
            free(endpoint);
            let bound = socket.bind(endpoint).await;
            bound.map_err(|error| failed(endpoint, error))?;
            again = Some(socket);
        }
        Ok(Publisher {
            events,
            again,
            kept: VecDeque::new(),
            buffer: settings.buffer,
        })
    }

    /// Publishes what comes, until there is nobody left to say anything.
    pub(super) async fn run(mut self, mut batches: mpsc::Receiver<Batch>) {
        loop {
            let asked = async {
                match &mut self.again {
                    Some(again) => again.recv().await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                batch = batches.recv() => match batch {
                    Some((seq, payload)) => self.publish(seq, payload.into()).await,
                    None => return,
                },
                asked = asked => if let Ok(asked) = asked {
                    self.tell_again(asked).await;
                },
            }
        }
    }

    async fn publish(&mut self, seq: u64, payload: Bytes) {
        if self.kept.len() >= self.buffer {
            self.kept.pop_front();
        }
        self.kept.push_back((seq, payload.clone()));
        let message = frames([Bytes::from_static(TOPIC), number(seq), payload]);
        // Who is not there misses it.
        let _ = self.events.send(message).await;
    }

    /// Frames: who asks, nothing, the first number.
    async fn tell_again(&mut self, asked: ZmqMessage) {
        let Some(again) = &mut self.again else { return };
        let asked = asked.into_vec();
        let [who, empty, start] = asked.as_slice() else {
            return;
        };
        let Ok(start) = <[u8; 8]>::try_from(start.as_ref()) else {
            return;
        };
        let start = u64::from_be_bytes(start);
        let kept = self.kept.iter().filter(|(seq, _)| *seq >= start);
        for (seq, payload) in kept {
            let topic = Bytes::from_static(TOPIC);
            let answer = [
                who.clone(),
                empty.clone(),
                topic,
                number(*seq),
                payload.clone(),
            ];
            if again.send(frames(answer)).await.is_err() {
                return;
            }
        }
        let end = [
            who.clone(),
            empty.clone(),
            Bytes::new(),
            number(u64::MAX),
            Bytes::new(),
        ];
        let _ = again.send(frames(end)).await;
    }
}

fn frames<const N: usize>(frames: [Bytes; N]) -> ZmqMessage {
    ZmqMessage::try_from(Vec::from(frames)).expect("it has frames")
}

fn number(number: u64) -> Bytes {
    Bytes::copy_from_slice(&number.to_be_bytes())
}

/// The socket of an engine that was killed is still there as a file.
fn free(endpoint: &str) {
    if let Some(path) = endpoint.strip_prefix("ipc://") {
        let _ = std::fs::remove_file(path);
    }
}
