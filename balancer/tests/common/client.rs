//! A client that sees every byte.

use std::net::SocketAddr;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::PATIENCE;

pub struct Head {
    pub status: u16,
    pub text: String,
}

impl Head {
    pub fn has(&self, line: &str) -> bool {
        self.text.to_lowercase().contains(&line.to_lowercase())
    }
}

pub struct Answer {
    pub status: u16,
    pub head: Head,
    pub body: String,
}

impl Answer {
    /// The status and the error's code.
    pub fn code(&self) -> (u16, String) {
        let object: serde_json::Value = serde_json::from_str(&self.body).unwrap_or_default();
        let code = object["error"]["code"].as_str().unwrap_or_default();
        assert!(self.head.has("x-request-id: "), "{}", self.head.text);
        (self.status, code.to_owned())
    }
}

/// HTTP/1.1, byte by byte.
pub struct Client {
    stream: TcpStream,
    read: Vec<u8>,
}

impl Client {
    pub async fn to(address: SocketAddr) -> Self {
        Self {
            stream: TcpStream::connect(address).await.unwrap(),
            read: Vec::new(),
        }
    }

    pub async fn send(&mut self, text: &str) {
        self.stream.write_all(text.as_bytes()).await.unwrap();
    }

    /// Sends what the other side may not want any more.
    pub async fn try_send(&mut self, text: &str) -> bool {
        self.stream.write_all(text.as_bytes()).await.is_ok()
    }

    pub async fn chat(&mut self, streaming: bool) {
        let body = format!("{{\"model\":\"m\",\"stream\":{streaming},\"messages\":[]}}");
        self.post("/v1/chat/completions", "", &body).await;
    }

    pub async fn post(&mut self, path: &str, headers: &str, body: &str) {
        let length = body.len();
        self.send(&format!(
            "POST {path} HTTP/1.1\r\nhost: x\r\n{headers}content-length: {length}\r\n\r\n{body}"
        ))
        .await;
    }

    async fn more(&mut self) -> bool {
        let mut piece = vec![0; 64 << 10];
        let reading = self.stream.read(&mut piece);
        let count = tokio::time::timeout(PATIENCE * 2, reading)
            .await
            .expect("the balancer says nothing")
            .unwrap_or(0);
        self.read.extend_from_slice(&piece[..count]);
        count > 0
    }

    async fn upto(&mut self, end: &[u8]) -> Option<Vec<u8>> {
        loop {
            if let Some(at) = self.read.windows(end.len()).position(|part| part == end) {
                return Some(self.read.drain(..at + end.len()).collect());
            }
            if !self.more().await {
                return None;
            }
        }
    }

    /// What comes next, of whatever protocol; empty at the end.
    pub async fn next_bytes(&mut self) -> Vec<u8> {
        self.more().await;
        std::mem::take(&mut self.read)
    }

    pub async fn head(&mut self) -> Head {
        let head = self.upto(b"\r\n\r\n").await.expect("an answer");
        let text = String::from_utf8(head).unwrap();
        let status = text.split(' ').nth(1).unwrap().parse().unwrap();
        Head { status, text }
    }

    /// The next chunk; none at the end of the body; an error where it breaks off.
    pub async fn chunk(&mut self) -> Result<Option<String>, String> {
        let line = self.upto(b"\r\n").await.ok_or("broke off")?;
        let size = String::from_utf8(line).unwrap();
        let size = usize::from_str_radix(size.trim(), 16).unwrap();
        while self.read.len() < size + 2 {
            if !self.more().await {
                return Err("broke off".into());
            }
        }
        let chunk: Vec<u8> = self.read.drain(..size + 2).take(size).collect();
        Ok((size > 0).then(|| String::from_utf8(chunk).unwrap()))
    }

    pub async fn body(&mut self, head: &Head) -> Result<String, String> {
        let length = head
            .text
            .to_lowercase()
            .split("content-length: ")
            .nth(1)
            .and_then(|rest| rest.split("\r\n").next()?.parse::<usize>().ok());
        if let Some(length) = length {
            while self.read.len() < length {
                if !self.more().await {
                    return Err("broke off".into());
                }
            }
            let body = self.read.drain(..length).collect();
            return Ok(String::from_utf8(body).unwrap());
        }
        let mut body = String::new();
        while let Some(chunk) = self.chunk().await? {
            body.push_str(&chunk);
        }
        Ok(body)
    }

    pub async fn answer(&mut self) -> Answer {
        let head = self.head().await;
        let body = self.body(&head).await.unwrap_or_else(|why| why);
        Answer {
            status: head.status,
            head,
            body,
        }
    }

    pub async fn is_closed(&mut self) -> bool {
        !self.more().await
    }
}
