//! Any HTTP request to `outrigger serve` is answered in full and within its bounds, the same as a stream and as a whole, or
//! is refused in OpenAI's shape; and the server goes on.
//!
//! The input is a request as people write it down: `POST /v1/completions`, headers a line each, an empty line, the body.
//! Version and length are put in here. It goes over a real connection, since there is no other way in.
#![no_main]

use std::net::SocketAddr;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt as _, Full};
use hyper::client::conn::http1;
use hyper::header::{CONTENT_LENGTH, CONTENT_TYPE, TRANSFER_ENCODING};
use hyper::{Method, Request, Response, Uri};
use hyper_util::rt::TokioIo;
use libfuzzer_sys::{Corpus, fuzz_target};
use outrigger::serve::{ServeConfig, serve};
use outrigger::{Engine, EngineConfig};
use outrigger_fuzz::tiny_model;
use serde_json::Value;
use tokio::net::{TcpListener, TcpStream};
use tokio::runtime::Runtime;

/// ChatML takes 55 of these tokens, which are bytes, around a message.
const CONTEXT: usize = 128;
/// Fuzzers are starved: no time is up.
const LONG: Duration = Duration::from_secs(24 * 60 * 60);
/// hyper itself refuses more than 100, in a shape of its own.
const MAX_HEADERS: usize = 64;
const COMPLETION_TOKENS: f64 = 16.0;

type Asked = Request<Full<Bytes>>;

struct Server {
    runtime: Runtime,
    address: SocketAddr,
}

thread_local! {
    static SERVER: Server = Server::start();
}

impl Server {
    fn start() -> Server {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        let runtime = runtime.expect("a runtime");
        let address = runtime.block_on(async {
            let mut engine = EngineConfig::new(tiny_model());
            engine.threads = 1;
            engine.context = Some(CONTEXT);
            let mut config = ServeConfig::new("tiny");
            config.seed = Some(7);
            config.allow_hosts = vec!["chat.example".to_owned()];
            (config.request_timeout, config.reader_timeout) = (LONG, LONG);
            let engine = Engine::open(engine).await.expect("the model opens");
            let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
            let address = listener.local_addr().expect("it listens");
            tokio::spawn(serve(engine, listener, config, std::future::pending()));
            address
        });
        Server { runtime, address }
    }

    /// The answer; none where our own side would not send the request.
    fn ask(&self, request: Asked) -> Option<Response<Bytes>> {
        self.runtime.block_on(async {
            let stream = TcpStream::connect(self.address).await.expect("it accepts");
            let (mut sender, connection) =
                http1::handshake(TokioIo::new(stream)).await.expect("a connection");
            tokio::spawn(connection);
            let response = match sender.send_request(request).await {
                Err(error) if error.is_user() => return None,
                response => response.expect("an answer"),
            };
            let (head, body) = response.into_parts();
            let body = body.collect().await.expect("all of it").to_bytes();
            Some(Response::from_parts(head, body))
        })
    }
}

/// The head of a request, and its body.
fn parts(data: &[u8]) -> (&[u8], &[u8]) {
    let end = data.windows(2).position(|two| two == b"\n\n").unwrap_or(data.len());
    (&data[..end], data.get(end + 2..).unwrap_or_default())
}

fn request(head: &[u8], body: &[u8]) -> Option<Asked> {
    let mut lines = head.split(|byte| *byte == b'\n');
    let first = lines.next()?;
    let space = first.iter().position(|byte| *byte == b' ')?;
    let mut request = Request::builder().method(&first[..space]).uri(&first[space + 1..]);
    for line in lines {
        let colon = line.iter().position(|byte| *byte == b':')?;
        request = request.header(&line[..colon], line[colon + 1..].trim_ascii());
    }
    let request = request.body(Full::new(Bytes::copy_from_slice(body))).ok()?;
    let headers = request.headers();
    let chunked = headers.get_all(TRANSFER_ENCODING).iter().all(|value| value == "chunked");
    let framed = chunked && !headers.contains_key(CONTENT_LENGTH);
    let sent = framed && headers.len() <= MAX_HEADERS && request.method() != Method::CONNECT;
    sent.then_some(request)
}

/// The same request, whole instead of streamed or the other way round: of two fields of one name the last one counts.
fn otherwise(request: &Asked, body: &[u8], stream: bool) -> Asked {
    let open = body.trim_ascii_end().strip_suffix(b"}").expect("an object");
    let field = format!(", \"stream\": {}}}", !stream);
    let mut other = request.clone();
    *other.body_mut() = Full::new([open, field.as_bytes()].concat().into());
    other
}

/// What a choice comes to.
#[derive(Debug, Default, PartialEq)]
struct Choice {
    text: String,
    finish: String,
    tokens: u64,
}

impl Choice {
    fn end(&mut self, choice: &Value) {
        self.finish = choice["finish_reason"].as_str().expect("a reason").to_owned();
        let made = &choice["outrigger"];
        assert_eq!((&made["exact"], &made["coverage"]), (&true.into(), &1.0.into()), "{made}");
        self.tokens = made["tokens"].as_u64().expect("a count");
    }
}

fn text(value: &Value) -> &str {
    value.as_str().expect("text")
}

fn json(body: &[u8]) -> Value {
    serde_json::from_slice(body).expect("JSON")
}

fn whole(body: &Value, chat: bool) -> Vec<Choice> {
    assert_eq!(body["object"], if chat { "chat.completion" } else { "text_completion" });
    let choices = body["choices"].as_array().expect("choices").iter().enumerate();
    let choices = choices.map(|(index, choice)| {
        assert_eq!(choice["index"], index);
        let said = if chat { &choice["message"]["content"] } else { &choice["text"] };
        let mut one = Choice { text: text(said).to_owned(), ..Choice::default() };
        one.end(choice);
        one
    });
    choices.collect()
}

/// The choices, and the usage where it was asked for.
fn streamed(body: &[u8], chat: bool) -> (Vec<Choice>, Value) {
    let body = str::from_utf8(body).expect("text");
    let mut events: Vec<&str> = body.split_terminator("\n\n").collect();
    assert_eq!(events.pop(), Some("data: [DONE]"));
    let (mut choices, mut usage, mut ended) = (Vec::new(), Value::Null, true);
    for event in events {
        let event = json(event.strip_prefix("data: ").expect("an event").as_bytes());
        assert!(usage.is_null(), "it comes last");
        let Some(piece) = event["choices"].get(0) else {
            assert!(ended && event["usage"].is_object(), "{event}");
            usage = event["usage"].clone();
            continue;
        };
        if ended {
            assert_eq!(!chat, piece["delta"]["role"].is_null(), "{event}");
            choices.push(Choice::default());
        }
        assert_eq!(piece["index"], choices.len() - 1);
        let last = choices.last_mut().expect("one was begun");
        let said = if chat { &piece["delta"]["content"] } else { &piece["text"] };
        last.text.push_str(said.as_str().unwrap_or_default());
        ended = !piece["finish_reason"].is_null();
        if ended {
            last.end(piece);
        }
    }
    assert!(ended, "{body}");
    (choices, usage)
}

/// What a request for text comes to, and its usage.
fn answered(answer: &Response<Bytes>, chat: bool, stream: bool) -> (Vec<Choice>, Value) {
    assert_eq!(answer.status(), 200);
    let kind = &answer.headers()[CONTENT_TYPE];
    if stream {
        assert_eq!(kind, "text/event-stream");
        return streamed(answer.body(), chat);
    }
    assert_eq!(kind, "application/json");
    assert_eq!(answer.headers()["outrigger-exact"], "true");
    let body = json(answer.body());
    (whole(&body, chat), body["usage"].clone())
}

/// As many choices as were asked for, none longer than it may be.
fn check(choices: &[Choice], usage: &Value, asked: &Value, chat: bool) {
    let several = |prompt: &&Vec<Value>| prompt.first().is_some_and(|first| !first.is_number());
    let prompts = asked["prompt"].as_array().filter(several).map_or(1, Vec::len);
    let n = asked["n"].as_f64().unwrap_or(1.0);
    assert_eq!(choices.len() as f64, prompts as f64 * n);
    assert!(choices.len() <= 16);
    let limits = ["max_completion_tokens", "max_tokens"].map(|field| asked[field].as_f64());
    let usual = if chat { CONTEXT as f64 } else { COMPLETION_TOKENS };
    let most = limits.into_iter().flatten().find(|limit| *limit > 0.0).unwrap_or(usual);
    let stops = match &asked["stop"] {
        Value::Array(stops) => stops.iter().map(text).collect(),
        stop => Vec::from_iter(stop.as_str()),
    };
    for choice in choices {
        assert!(choice.tokens as f64 <= most, "{choice:?}");
        assert!(!stops.iter().any(|stop| choice.text.contains(stop)), "{choice:?}");
        assert!(choice.finish == "stop" || choice.finish == "length", "{choice:?}");
    }
    if let Some(completion) = usage["completion_tokens"].as_u64() {
        let prompt = usage["prompt_tokens"].as_u64().expect("a count");
        assert_eq!(completion, choices.iter().map(|choice| choice.tokens).sum::<u64>());
        assert_eq!(usage["total_tokens"], prompt + completion);
        // The last token of a full context is said and not computed.
        assert!(completion <= ((CONTEXT + 1) * choices.len()) as u64);
    }
}

fn refused(answer: &Response<Bytes>, method: &Method) {
    assert!(answer.status().is_client_error(), "{}", answer.status());
    if method == Method::HEAD {
        return assert!(answer.body().is_empty());
    }
    let error = &json(answer.body())["error"];
    assert_eq!(error["type"], "invalid_request_error", "{error}");
    assert!(!text(&error["message"]).is_empty() && !text(&error["code"]).is_empty(), "{error}");
    assert!(error["param"].is_null() || error["param"].is_string(), "{error}");
}

fn told(answer: &Response<Bytes>, uri: &Uri) {
    match uri.path() {
        "/metrics" => assert!(answer.body().ends_with(b"# EOF\n")),
        _ => assert!(json(answer.body()).is_object()),
    }
}

fuzz_target!(|data: &[u8]| -> Corpus {
    let (head, body) = parts(data);
    let Some(request) = request(head, body) else { return Corpus::Reject };
    SERVER.with(|server| {
        let Some(answer) = server.ask(request.clone()) else { return Corpus::Reject };
        if answer.status() != 200 {
            refused(&answer, request.method());
            return Corpus::Keep;
        }
        let chat = match request.uri().path() {
            "/v1/chat/completions" => true,
            "/v1/completions" => false,
            _ => {
                told(&answer, request.uri());
                return Corpus::Keep;
            }
        };
        let asked = json(body);
        let stream = asked["stream"] == true;
        let (choices, usage) = answered(&answer, chat, stream);
        check(&choices, &usage, &asked, chat);
        // Once more: the prompt is there already, which changes nothing.
        let again = server.ask(otherwise(&request, body, stream)).expect("as before");
        let (others, usage) = answered(&again, chat, !stream);
        assert_eq!(choices, others);
        check(&others, &usage, &asked, chat);
        Corpus::Keep
    })
});
