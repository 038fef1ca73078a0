//! An engine to test against, and a plain HTTP/1.1 client that can walk away at any byte.

use forebay_sim::engine::{self, Config, EngineError};
use std::net::SocketAddr;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tokio::time::{Instant, timeout};

/// An engine on a free port that stops with the test.
pub struct Engine {
    pub address: SocketAddr,
    task: JoinHandle<Result<(), EngineError>>,
}

impl Drop for Engine {
    fn drop(&mut self) {
        self.task.abort();
    }
}

pub async fn engine(change: impl FnOnce(&mut Config)) -> Engine {
    let mut config = Config {
        models: vec!["m".to_owned()],
        speed: 100.0,
        ..Config::default()
    };
    change(&mut config);
    let (sender, ready) = oneshot::channel();
    let serve = engine::serve(
        config,
        |address| sender.send(address).unwrap(),
        std::future::pending(),
    );
    let task = tokio::spawn(serve);
    Engine {
        address: ready.await.unwrap(),
        task,
    }
}

impl Engine {
    /// Sends a request and returns the open connection.
    pub async fn open(&self, method: &str, path: &str, headers: &str, body: &str) -> TcpStream {
        let mut stream = TcpStream::connect(self.address).await.unwrap();
        let head = format!(
            "{method} {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n{headers}content-length: {}\r\n\r\n",
            body.len()
        );
        stream.write_all(head.as_bytes()).await.unwrap();
        stream.write_all(body.as_bytes()).await.unwrap();
        stream
    }

    /// Sends a request and returns the status, the head and the body (its chunks joined).
    pub async fn ask(
        &self,
        method: &str,
        path: &str,
        headers: &str,
        body: &str,
    ) -> (u16, String, String) {
        let mut stream = self.open(method, path, headers, body).await;
        let mut answer = String::new();
        timeout(Duration::from_secs(20), stream.read_to_string(&mut answer))
            .await
            .unwrap()
            .unwrap();
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        let status = head.split(' ').nth(1).unwrap().parse().unwrap();
        let chunked = head
            .to_ascii_lowercase()
            .contains("transfer-encoding: chunked");
        let body = if chunked {
            dechunked(body)
        } else {
            body.to_owned()
        };
        (status, head.to_owned(), body)
    }

    /// `vllm:NAME` on the metrics page.
    pub async fn metric(&self, name: &str) -> f64 {
        let (_, _, page) = self.ask("GET", "/metrics", "", "").await;
        let line = page
            .lines()
            .find(|line| line.starts_with(&format!("vllm:{name}{{")))
            .unwrap();
        line.rsplit(' ').next().unwrap().parse().unwrap()
    }

    pub async fn open_requests(&self) -> f64 {
        self.metric("num_requests_running").await + self.metric("num_requests_waiting").await
    }

    /// Waits for so many open requests; says how long that took.
    pub async fn until_open(&self, count: f64, within: Duration) -> Duration {
        let start = Instant::now();
        while self.open_requests().await != count {
            assert!(
                start.elapsed() < within,
                "not {count} open requests within {within:?}"
            );
        }
        start.elapsed()
    }
}

fn dechunked(mut body: &str) -> String {
    let mut whole = String::new();
    loop {
        let (size, rest) = body.split_once("\r\n").unwrap();
        let size = usize::from_str_radix(size, 16).unwrap();
        if size == 0 {
            return whole;
        }
        whole.push_str(&rest[..size]);
        body = &rest[size + 2..];
    }
}
