//! Clients that ask, wait for the answer, and ask again.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use forebay_benches::servers::Servers;
use hdrhistogram::Histogram;
use http_body_util::{BodyExt, Full};
use hyper::Request;
use hyper::client::conn::http1::{SendRequest, handshake};
use hyper_util::rt::TokioIo;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use tokio::net::TcpStream;

use crate::engine::MODEL;

/// Prompts that take turns: no two begin alike.
const PROMPTS: usize = 64;

/// What one measurement saw.
#[derive(Clone, Copy)]
pub(crate) struct Seen {
    pub(crate) rate: f64,
    /// CPU of what is between, in seconds for 1,000 requests.
    pub(crate) cpu_a_thousand: f64,
    /// From the request to the first byte of the body.
    pub(crate) p50_ms: f64,
    pub(crate) p99_ms: f64,
}

/// Bodies of requests.
pub(crate) struct Load {
    bodies: Arc<Vec<Bytes>>,
}

impl Load {
    /// Chats with a prompt of so many bytes.
    pub(crate) fn new(prompt: usize, stream: bool) -> Self {
        let mut rng = StdRng::seed_from_u64(prompt as u64);
        let bodies = (0..PROMPTS).map(|_| {
            let mut text = String::with_capacity(prompt);
            while text.len() < prompt {
                let letters = rng.random_range(2..9);
                text.extend((0..letters).map(|_| char::from(rng.random_range(b'a'..=b'z'))));
                text.push(' ');
            }
            text.truncate(prompt);
            let body = format!(
                r#"{{"model":"{MODEL}","stream":{stream},"max_tokens":64,"messages":[{{"role":"user","content":"{text}"}}]}}"#
            );
            Bytes::from(body)
        });
        Self {
            bodies: Arc::new(bodies.collect()),
        }
    }

    /// So many connections ask for a while; the first half second does not count.
    pub(crate) async fn run(
        &self,
        address: SocketAddr,
        between: &Servers,
        connections: usize,
        seconds: u64,
    ) -> Seen {
        let begins = Instant::now() + Duration::from_millis(500);
        let ends = begins + Duration::from_secs(seconds);
        let clients = (0..connections).map(|number| {
            let bodies = self.bodies.clone();
            tokio::spawn(async move {
                let mut client = Client::connect(address).await;
                let mut waits = Histogram::<u64>::new(3).unwrap();
                let mut turn = number;
                loop {
                    let asked = Instant::now();
                    if asked >= ends {
                        return waits;
                    }
                    turn += 1;
                    let first = client.ask(bodies[turn % PROMPTS].clone()).await;
                    if asked >= begins {
                        waits.record(first.as_micros().try_into().unwrap()).unwrap();
                    }
                }
            })
        });
        let clients: Vec<_> = clients.collect();
        tokio::time::sleep_until(begins.into()).await;
        let before = between.cpu_seconds();
        tokio::time::sleep_until(ends.into()).await;
        let cpu = between.cpu_seconds() - before;
        let mut waits = Histogram::<u64>::new(3).unwrap();
        for client in clients {
            waits.add(client.await.unwrap()).unwrap();
        }
        let ms = |quantile| waits.value_at_quantile(quantile) as f64 / 1e3;
        Seen {
            rate: waits.len() as f64 / seconds as f64,
            cpu_a_thousand: cpu / waits.len().max(1) as f64 * 1e3,
            p50_ms: ms(0.5),
            p99_ms: ms(0.99),
        }
    }
}

struct Client(SendRequest<Full<Bytes>>);

impl Client {
    async fn connect(address: SocketAddr) -> Self {
        let socket = TcpStream::connect(address).await.unwrap();
        socket.set_nodelay(true).unwrap();
        let (sender, connection) = handshake(TokioIo::new(socket)).await.unwrap();
        tokio::spawn(connection);
        Self(sender)
    }

    /// Returns how long the first byte of the body took, after the last one came.
    async fn ask(&mut self, body: Bytes) -> Duration {
        let request = Request::post("/v1/chat/completions")
            .header("host", "engine")
            .header("content-type", "application/json")
            .header("authorization", "Bearer bench")
            .body(Full::new(body))
            .unwrap();
        let asked = Instant::now();
        self.0.ready().await.unwrap();
        let mut answer = self.0.send_request(request).await.unwrap();
        let (mut first, mut bytes) = (None, 0);
        while let Some(frame) = answer.frame().await {
            let frame = frame.unwrap();
            first.get_or_insert_with(|| asked.elapsed());
            bytes += frame.data_ref().map_or(0, Bytes::len);
        }
        assert!(answer.status() == 200 && bytes > 100, "{answer:?}");
        first.unwrap()
    }
}

/// Waits until something answers this path with 200.
pub(crate) async fn wait_for(address: SocketAddr, path: &str) {
    for _ in 0..300 {
        tokio::time::sleep(Duration::from_millis(100)).await;
        let Ok(socket) = TcpStream::connect(address).await else {
            continue;
        };
        let Ok((mut sender, connection)) = handshake(TokioIo::new(socket)).await else {
            continue;
        };
        tokio::spawn(connection);
        let request = Request::get(path).header("host", "engine");
        let request = request.body(Full::<Bytes>::default()).unwrap();
        if let Ok(answer) = sender.send_request(request).await
            && answer.status() == 200
        {
            return;
        }
    }
    panic!("nothing answers at http://{address}{path}");
}
