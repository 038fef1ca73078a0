//! An engine that answers what it is told to.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;

/// What it answers to a request for text.
#[derive(Clone)]
pub struct Answer {
    status: u16,
    kind: &'static str,
    body: String,
    /// Behind the body it says nothing more, and does not end.
    hangs: bool,
}

impl Answer {
    pub fn of(status: u16, body: &str) -> Self {
        Self {
            status,
            kind: "application/json",
            body: body.into(),
            hangs: false,
        }
    }

    pub fn events(events: &[&str]) -> Self {
        Self {
            status: 200,
            kind: "text/event-stream; charset=utf-8",
            body: events.concat(),
            hangs: false,
        }
    }

    pub fn and_hangs(mut self) -> Self {
        self.hangs = true;
        self
    }
}

/// What it was asked.
#[derive(Clone, Default)]
pub struct Asked {
    pub request_id: String,
    pub body: String,
}

struct Script {
    models: String,
    metrics: String,
    slots: String,
    answer: Answer,
    asked: Asked,
    read: Vec<String>,
    /// It says nothing to requests for text.
    hangs: bool,
    /// Its counters go on whenever they are read.
    works: bool,
    work: u64,
}

pub struct Scripted {
    pub address: SocketAddr,
    script: Arc<Mutex<Script>>,
    task: JoinHandle<()>,
}

impl Drop for Scripted {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Scripted {
    pub async fn vllm() -> Self {
        Self::start(
            include_str!("../samples/vllm-models.json"),
            include_str!("../samples/vllm-metrics.txt"),
            "",
        )
        .await
    }

    pub async fn sglang() -> Self {
        Self::start(
            include_str!("../samples/sglang-models.json"),
            include_str!("../samples/sglang-metrics.txt"),
            "",
        )
        .await
    }

    pub async fn llama() -> Self {
        let slot = r#"{"id":0,"n_ctx":2048,"speculative":false,"is_processing":false}"#;
        let slots = format!("[{slot},{slot},{slot},{slot}]");
        Self::start(
            include_str!("../samples/llama-models.json"),
            include_str!("../samples/llama-metrics.txt"),
            &slots,
        )
        .await
    }

    pub async fn unknown() -> Self {
        Self::start(r#"{"data":[{"id":"any","owned_by":"me"}]}"#, "", "").await
    }

    async fn start(models: &str, metrics: &str, slots: &str) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let script = Arc::new(Mutex::new(Script {
            models: models.into(),
            metrics: metrics.into(),
            slots: slots.into(),
            answer: Answer::of(500, "{}"),
            asked: Asked::default(),
            read: vec![],
            hangs: false,
            works: false,
            work: 183,
        }));
        let shared = script.clone();
        let task = tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                tokio::spawn(serve(stream, shared.clone()));
            }
        });
        Self {
            address,
            script,
            task,
        }
    }

    /// From here on it answers this.
    pub fn says(&self, answer: Answer) {
        self.script.lock().answer = answer;
    }

    /// From here on it says nothing to requests for text; its counters go on, or not.
    pub fn hangs(&self, hangs: bool, works: bool) {
        let mut script = self.script.lock();
        (script.hangs, script.works) = (hangs, works);
    }

    /// From here on its metrics page says this.
    pub fn metrics(&self, page: String) {
        self.script.lock().metrics = page;
    }

    /// What it was asked last.
    pub fn asked(&self) -> Asked {
        self.script.lock().asked.clone()
    }

    /// Waits until a page was read so many times.
    pub async fn until_read(&self, path: &str, times: usize) {
        for _ in 0..2_000 {
            let read = self
                .script
                .lock()
                .read
                .iter()
                .filter(|read| *read == path)
                .count();
            if read >= times {
                return;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        panic!("{path} is not read");
    }
}

/// One request, and the connection is closed.
async fn serve(stream: TcpStream, script: Arc<Mutex<Script>>) {
    let mut stream = BufReader::new(stream);
    let (mut first, mut length, mut request_id) = (String::new(), 0, String::new());
    if stream.read_line(&mut first).await.unwrap_or(0) == 0 {
        return;
    }
    loop {
        let mut line = String::new();
        if stream.read_line(&mut line).await.unwrap_or(0) == 0 {
            return;
        }
        match line.trim_end().split_once(": ") {
            Some(("content-length", value)) => length = value.parse().unwrap(),
            Some(("x-request-id", value)) => request_id = value.into(),
            Some(_) => {}
            None => break,
        }
    }
    let mut body = vec![0; length];
    if stream.read_exact(&mut body).await.is_err() {
        return;
    }
    let path = first.split(' ').nth(1).unwrap().to_owned();
    let answer = {
        let mut script = script.lock();
        script.read.push(path.clone());
        match path.as_str() {
            "/v1/models" => Answer::of(200, &script.models),
            "/metrics" if !script.metrics.is_empty() => {
                script.work += u64::from(script.works);
                let work = format!(" {}\n", script.work);
                Answer::of(200, &script.metrics.replace(" 183\n", &work))
            }
            "/slots" if !script.slots.is_empty() => Answer::of(200, &script.slots),
            "/health" => Answer::of(200, ""),
            "/apply-template" if !script.slots.is_empty() => {
                let prompt = rendered(&serde_json::from_slice(&body).unwrap());
                Answer::of(200, &serde_json::json!({"prompt": prompt}).to_string())
            }
            path if path.starts_with("/v1/") => {
                script.asked = Asked {
                    request_id,
                    body: String::from_utf8(body).unwrap(),
                };
                if script.hangs {
                    Answer::of(0, "")
                } else {
                    script.answer.clone()
                }
            }
            _ => Answer::of(404, r#"{"detail":"Not Found"}"#),
        }
    };
    let Answer {
        status,
        kind,
        body,
        hangs,
    } = answer;
    if status == 0 {
        // Until the agent goes.
        let _ = stream.read(&mut [0]).await;
        return;
    }
    let length = body.len() + usize::from(hangs);
    let head = format!(
        "HTTP/1.1 {status} X\r\ncontent-type: {kind}\r\ncontent-length: {length}\r\nconnection: close\r\n\r\n"
    );
    let _ = stream.write_all((head + &body).as_bytes()).await;
    if hangs {
        let _ = stream.flush().await;
        let _ = stream.read(&mut [0]).await;
    }
}

/// By a template that puts tools first and knows names.
fn rendered(conversation: &serde_json::Value) -> String {
    let tools = conversation.get("tools").map(|tools| tools.to_string());
    let messages = conversation["messages"].as_array().unwrap().iter();
    let said = messages.map(|message| {
        let (role, name, content) = (&message["role"], &message["name"], &message["content"]);
        format!("<{role} {name}>{content}")
    });
    tools.into_iter().chain(said).collect()
}
