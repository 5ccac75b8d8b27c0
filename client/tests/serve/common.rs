//! A served demo model, and HTTP/1.1 spoken by hand.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use outrigger::serve::{ServeConfig, serve};
use outrigger::{Budget, Elsewhere, Engine, EngineConfig, SamplerConfig};
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::{TcpListener, TcpStream};

/// What no test should need.
pub(crate) const LONG: Duration = Duration::from_secs(120);

pub(crate) fn demo() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/demo.gguf")
}

/// All of the demo model.
pub(crate) fn whole() -> EngineConfig {
    EngineConfig { threads: 1, ..EngineConfig::new(demo()) }
}

/// A quarter of it, and the other experts nowhere but on `servers`.
pub(crate) fn quarter(servers: Vec<String>) -> EngineConfig {
    EngineConfig {
        servers,
        expert_cache: Budget::Fraction(0.25),
        elsewhere: Elsewhere::Absent,
        ..whole()
    }
}

/// Always the likeliest token.
pub(crate) fn greedy() -> ServeConfig {
    ServeConfig { sampler: SamplerConfig::greedy(), ..ServeConfig::new("demo") }
}

/// A served model.
pub(crate) struct Served {
    pub(crate) address: SocketAddr,
    pub(crate) engine: Arc<Engine>,
}

impl Served {
    pub(crate) async fn start(engine: EngineConfig, config: ServeConfig) -> Served {
        let engine = Engine::open(engine).await.expect("it opens");
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let address = listener.local_addr().expect("it listens");
        tokio::spawn(serve(engine.clone(), listener, config, std::future::pending()));
        Served { address, engine }
    }

    /// All of the demo model, greedy.
    pub(crate) async fn demo() -> Served {
        Served::start(whole(), greedy()).await
    }

    pub(crate) async fn get(&self, path: &str) -> Response {
        ask(self.address, &head("GET", path, &[]), b"").await
    }

    pub(crate) async fn post(&self, path: &str, body: &Value) -> Response {
        self.post_with(path, &[], body.to_string().as_bytes()).await
    }

    pub(crate) async fn post_with(&self, path: &str, headers: &[&str], body: &[u8]) -> Response {
        ask(self.address, &post_head(path, headers, body.len()), body).await
    }

    /// A completion of `prompt` with more fields.
    pub(crate) async fn complete(&self, prompt: impl Into<Value>, fields: Value) -> Response {
        self.post("/v1/completions", &completion(prompt, fields)).await
    }

    /// Tokens that were sampled since the start, as `/metrics` has it.
    pub(crate) async fn tokens(&self) -> u64 {
        let metrics = self.get("/metrics").await.text();
        let line = metrics.lines().find_map(|line| line.strip_prefix("outrigger_tokens_total "));
        line.expect("the counter is there").parse().expect("a number")
    }
}

pub(crate) fn completion(prompt: impl Into<Value>, fields: Value) -> Value {
    let mut body = json!({ "prompt": prompt.into() });
    body.as_object_mut().expect("an object").extend(fields.as_object().expect("fields").clone());
    body
}

fn head(method: &str, path: &str, headers: &[&str]) -> String {
    let host = match headers.iter().any(|header| header.starts_with("Host:")) {
        true => "",
        false => "Host: localhost\r\n",
    };
    let more: String = headers.iter().map(|header| format!("{header}\r\n")).collect();
    format!("{method} {path} HTTP/1.1\r\n{host}Connection: close\r\n{more}\r\n")
}

pub(crate) fn post_head(path: &str, headers: &[&str], length: usize) -> String {
    let length = format!("Content-Length: {length}");
    let mut all = vec!["Content-Type: application/json", &length];
    all.extend(headers);
    head("POST", path, &all)
}

/// Sends a request and reads all of the response.
pub(crate) async fn ask(address: SocketAddr, head: &str, body: &[u8]) -> Response {
    let mut stream = Stream::open(address, head, body).await;
    let mut body = Vec::new();
    while let Some(chunk) = stream.chunk().await {
        body.extend(chunk);
    }
    Response { body, status: stream.status, headers: stream.headers }
}

#[derive(Debug)]
pub(crate) struct Response {
    pub(crate) status: u16,
    headers: String,
    body: Vec<u8>,
}

impl Response {
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        let prefix = format!("{name}: ");
        self.headers.lines().find_map(|line| line.strip_prefix(&prefix))
    }

    pub(crate) fn text(&self) -> String {
        String::from_utf8(self.body.clone()).expect("text")
    }

    /// The body of an answer that was given.
    pub(crate) fn json(&self) -> Value {
        assert_eq!(self.status, 200, "{}", self.text());
        serde_json::from_slice(&self.body).expect("JSON")
    }

    /// The code, the field and the message of an error in OpenAI's shape.
    pub(crate) fn error(&self) -> (String, Value, String) {
        let body: Value = serde_json::from_slice(&self.body).expect("JSON");
        let error = &body["error"];
        let kind = if self.status < 500 { "invalid_request_error" } else { "server_error" };
        assert_eq!(error["type"], kind, "{body}");
        let text = |field: &str| error[field].as_str().expect("text").to_owned();
        (text("code"), error["param"].clone(), text("message"))
    }

    /// What a stream brought, which is whole.
    pub(crate) fn events(&self) -> Vec<Value> {
        assert_eq!(self.status, 200, "{}", self.text());
        let text = self.text();
        let mut events: Vec<&str> = text.split_terminator("\n\n").collect();
        assert_eq!(events.pop(), Some("data: [DONE]"));
        events.into_iter().map(event).collect()
    }
}

pub(crate) fn event(text: &str) -> Value {
    serde_json::from_str(text.strip_prefix("data: ").expect("an event")).expect("JSON")
}

/// The text of the first choice of a stream of completions.
pub(crate) fn said(events: &[Value]) -> String {
    let texts = events.iter().filter(|event| event["choices"][0]["index"] == 0);
    texts.map(|event| event["choices"][0]["text"].as_str().expect("text")).collect()
}

/// A response as it comes.
pub(crate) struct Stream {
    reader: BufReader<TcpStream>,
    pub(crate) status: u16,
    pub(crate) headers: String,
    /// Bytes that are left of a body of known length.
    left: Option<usize>,
}

impl Stream {
    pub(crate) async fn open(address: SocketAddr, head: &str, body: &[u8]) -> Stream {
        let mut stream = TcpStream::connect(address).await.expect("it accepts");
        stream.write_all(head.as_bytes()).await.expect("it listens");
        // It may refuse before it has all of it.
        let _ = stream.write_all(body).await;
        let mut reader = BufReader::new(stream);
        let mut headers = String::new();
        while !headers.ends_with("\r\n\r\n") {
            let read = tokio::time::timeout(LONG, reader.read_line(&mut headers)).await;
            assert_ne!(read.expect("it answers").expect("it answers"), 0, "{headers:?}");
        }
        let headers = headers.to_ascii_lowercase();
        let status = headers[9..12].parse().expect("a status");
        let left = headers.lines().find_map(|line| line.strip_prefix("content-length: "));
        let left = left.map(|length| length.parse().expect("a length"));
        Stream { reader, status, headers, left }
    }

    /// A part of the body; none at its end.
    pub(crate) async fn chunk(&mut self) -> Option<Vec<u8>> {
        tokio::time::timeout(LONG, self.read_chunk()).await.expect("it goes on")
    }

    async fn read_chunk(&mut self) -> Option<Vec<u8>> {
        let size = match self.left {
            Some(0) => return None,
            Some(_) => self.left.replace(0)?,
            None => {
                let mut line = String::new();
                self.reader.read_line(&mut line).await.expect("a chunk");
                usize::from_str_radix(line.trim(), 16).expect("a size")
            }
        };
        let mut chunk = vec![0; size];
        self.reader.read_exact(&mut chunk).await.expect("all of it");
        if self.left.is_none() {
            self.reader.read_exact(&mut [0; 2]).await.expect("its end");
        }
        (size > 0).then_some(chunk)
    }

    /// The next event of a stream; none at its end.
    pub(crate) async fn event(&mut self) -> Option<Value> {
        let text = String::from_utf8(self.chunk().await?).expect("text");
        (text != "data: [DONE]\n\n").then(|| event(&text))
    }
}
