//! A client whose requests may be cut off, and whose streams are read as they come.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

/// Nothing may take longer: what is waited for is a typed end.
const PATIENCE: Duration = Duration::from_secs(60);

/// A request whose answer is read as it comes; dropped, its connection is closed.
pub struct Asked {
    stream: TcpStream,
    text: String,
}

/// An answer that came to its end.
#[derive(Debug)]
pub struct Whole {
    pub status: u16,
    pub text: String,
}

impl Asked {
    pub fn of(url: &str, path: &str, body: &str) -> Self {
        let host = url.strip_prefix("http://").unwrap();
        let length = body.len();
        let request = format!(
            "POST {path} HTTP/1.1\r\nhost: {host}\r\nauthorization: Bearer any\r\n\
             content-type: application/json\r\ncontent-length: {length}\r\nconnection: close\r\n\r\n{body}"
        );
        let mut stream = TcpStream::connect(host).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.write_all(request.as_bytes()).unwrap();
        Self {
            stream,
            text: String::new(),
        }
    }

    /// Waits until so many events came.
    pub fn until_events(&mut self, count: usize) {
        let began = Instant::now();
        while self.text.matches("data: ").count() < count {
            assert!(began.elapsed() < PATIENCE, "no event: {}", self.text);
            assert!(self.read() > 0, "the answer ended early: {}", self.text);
        }
    }

    /// Reads to the end.
    pub fn whole(mut self) -> Whole {
        while self.read() > 0 {}
        let status = self
            .text
            .split(' ')
            .nth(1)
            .and_then(|status| status.parse().ok());
        Whole {
            status: status.unwrap_or(0),
            text: self
                .text
                .split_once("\r\n\r\n")
                .map_or(String::new(), |(_, rest)| rest.to_owned()),
        }
    }

    fn read(&mut self) -> usize {
        let mut piece = [0; 64 << 10];
        let read = self.stream.read(&mut piece).unwrap_or(0);
        self.text.push_str(&String::from_utf8_lossy(&piece[..read]));
        read
    }
}

impl Whole {
    /// Whether it is an answer, or a stream that says why it ended.
    pub fn is_complete(&self) -> bool {
        self.status == 200
            && self.text.contains("\"finish_reason\":\"")
            && !self.text.contains("\"error\":")
    }

    /// Whether it is an error with a type, as a document or as the last event of a stream.
    pub fn is_typed_error(&self) -> bool {
        self.text.contains("\"error\":")
            && self.text.contains("\"type\":")
            && !self.text.contains("[DONE]")
    }
}

/// A chat about this, in a stream or not.
pub fn chat(model: &str, text: &str, stream: bool, max_tokens: u32) -> String {
    serde_json::json!({
        "model": model, "stream": stream, "max_tokens": max_tokens, "ignore_eos": true, "temperature": 0,
        "messages": [{"role": "user", "content": text}],
    })
    .to_string()
}

pub const CHAT: &str = "/v1/chat/completions";

/// Asks and waits for the whole answer.
pub fn ask(url: &str, body: &str) -> Whole {
    Asked::of(url, CHAT, body).whole()
}
