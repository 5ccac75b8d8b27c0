//! Bad requests and bad callers. `docs/faults.md` names these tests.

use std::time::Duration;

use outrigger::serve::ServeConfig;
use serde_json::json;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use crate::common::{LONG, Served, Stream, ask, completion, greedy, post_head, whole};

const PROMPT: &str = "Once upon a time there was a king who";

#[tokio::test(flavor = "multi_thread")]
async fn bad_and_huge_bodies_are_refused() {
    let served = Served::demo().await;
    for body in ["", "{", "[]", "\u{0}", "{\"messages\": 1e999}"] {
        let response = served.post_with("/v1/chat/completions", &[], body.as_bytes()).await;
        assert_eq!(response.status, 400, "{body}");
        assert!(response.error().2.contains("body: found"), "{body}");
    }
    let response = served.complete(json!({ "a": 1 }), json!({})).await;
    let (code, param, message) = response.error();
    assert_eq!((response.status, code.as_str(), param), (400, "invalid_value", json!("prompt")));
    assert!(message.contains("found an object, expected a string"), "{message}");

    // One that says how large it is, and one that does not.
    let huge = vec![b' '; (64 << 10) + 32 * served.engine.context() + 1];
    let response = served.post_with("/v1/completions", &[], &huge).await;
    assert_eq!((response.status, response.error().0.as_str()), (413, "body_too_large"));
    let head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\
                Transfer-Encoding: chunked\r\n\r\n";
    let chunked = [format!("{:x}\r\n", huge.len()).as_bytes(), &huge].concat();
    let response = ask(served.address, head, &chunked).await;
    assert_eq!((response.status, response.error().0.as_str()), (413, "body_too_large"));
}

#[tokio::test(flavor = "multi_thread")]
async fn prompts_beyond_the_context_are_refused() {
    let served = Served::demo().await;
    let context = served.engine.context();
    let chat = json!({ "messages": [{ "role": "user", "content": "word ".repeat(2 * context) }] });
    let text = completion(vec![7; context + 1], json!({}));
    for (path, param, body) in
        [("/v1/chat/completions", "messages", chat), ("/v1/completions", "prompt", text)]
    {
        let response = served.post(path, &body).await;
        let (code, named, message) = response.error();
        assert_eq!((response.status, code.as_str()), (400, "context_length_exceeded"));
        assert_eq!(named, param);
        assert!(message.contains(&format!("at most {context}")), "{message}");
    }
    let response = served.complete(json!([]), json!({})).await;
    assert_eq!((response.status, response.error().1), (400, json!("prompt")), "no token at all");
    assert_eq!(served.tokens().await, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn other_paths_and_methods_are_refused() {
    let served = Served::demo().await;
    for path in ["/", "/v1/embeddings", "/v1/chat/completions/"] {
        assert_eq!(served.get(path).await.status, 404, "{path}");
    }
    assert_eq!(served.get("/v1/completions").await.status, 405);
    assert_eq!(served.post("/v1/models", &json!({})).await.status, 405);
    assert_eq!(served.post("/v1/embeddings", &json!({})).await.status, 404);
    let mut check = TcpStream::connect(served.address).await.unwrap();
    let head = b"HEAD /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n";
    check.write_all(head).await.unwrap();
    let mut answer = Vec::new();
    check.read_to_end(&mut answer).await.unwrap();
    let answer = String::from_utf8(answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 200") && answer.ends_with("\r\n\r\n"), "{answer}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_body_that_never_ends_is_given_up() {
    let request_timeout = Duration::from_millis(300);
    let served = Served::start(whole(), ServeConfig { request_timeout, ..greedy() }).await;
    let response = ask(served.address, &post_head("/v1/completions", &[], 100), b"{").await;
    assert_eq!((response.status, response.error().0.as_str()), (408, "slow_body"));

    // A head that never ends is not answered.
    let mut silent = TcpStream::connect(served.address).await.unwrap();
    silent.write_all(b"POST /v1/completions HTTP/1.1\r\n").await.unwrap();
    let mut answer = Vec::new();
    let closed = tokio::time::timeout(LONG, silent.read_to_end(&mut answer)).await;
    closed.expect("it is closed").unwrap();
    assert_eq!(answer, b"");
}

/// Its generation stops: another request has the only place long before it could have ended, and then nothing more is
/// sampled.
#[tokio::test(flavor = "multi_thread")]
async fn a_reader_that_goes_away_stops_its_generation() {
    let served = Served::demo().await;
    let most = served.engine.context() - 64;
    for stream in [true, false] {
        let before = served.tokens().await;
        let body = completion(PROMPT, json!({ "max_tokens": most, "stream": stream })).to_string();
        let head = post_head("/v1/completions", &[], body.len());
        if stream {
            let mut reader = Stream::open(served.address, &head, body.as_bytes()).await;
            reader.event().await.expect("a token");
        } else {
            let mut reader = TcpStream::connect(served.address).await.unwrap();
            reader.write_all(head.as_bytes()).await.unwrap();
            reader.write_all(body.as_bytes()).await.unwrap();
            while served.tokens().await == before {}
        }
        let next = served.complete(PROMPT, json!({ "max_tokens": 1 })).await;
        assert_eq!(next.status, 200);
        let after = served.tokens().await;
        assert!(after - before < most as u64, "{} tokens for nobody", after - before);
        served.complete(PROMPT, json!({ "max_tokens": 1 })).await;
        assert_eq!(served.tokens().await, after + 1);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn foreign_hosts_and_pages_are_refused() {
    let allow_hosts = vec!["chat.example".to_owned()];
    let served = Served::start(whole(), ServeConfig { allow_hosts, ..greedy() }).await;
    let body = completion(PROMPT, json!({ "max_tokens": 1 })).to_string();
    let post = async |headers: &[&str]| {
        let response = served.post_with("/v1/completions", headers, body.as_bytes()).await;
        assert_eq!(response.header("access-control-allow-origin"), None);
        response
    };
    assert_eq!(post(&["Host: chat.example"]).await.status, 200);
    assert_eq!(post(&["Host: localhost:1", "Origin: http://localhost:1"]).await.status, 200);
    for headers in [
        &["Host: evil.example"][..],
        &["Host: evil.example", "Origin: http://evil.example"],
        &["Origin: http://evil.example"],
        &["Origin: null"],
    ] {
        let response = post(headers).await;
        assert_eq!((response.status, response.error().0.as_str()), (403, "foreign_site"));
    }
    assert_eq!(served.tokens().await, 2);
    // What a browser asks first.
    let preflight = "OPTIONS /v1/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\
                     Access-Control-Request-Method: POST\r\n\r\n";
    let response = ask(served.address, preflight, b"").await;
    assert_eq!(response.status, 405);
    assert_eq!(response.header("access-control-allow-origin"), None);
}

#[tokio::test(flavor = "multi_thread")]
async fn without_the_key_only_health_is_told() {
    let api_key = Some("0123456789abcdef".parse().unwrap());
    let served = Served::start(whole(), ServeConfig { api_key, ..greedy() }).await;
    let body = completion(PROMPT, json!({ "max_tokens": 1 })).to_string();
    let post = async |headers: &[&str]| {
        served.post_with("/v1/completions", headers, body.as_bytes()).await
    };
    assert_eq!(post(&["Authorization: Bearer 0123456789abcdef"]).await.status, 200);
    for headers in [
        &[][..],
        &["Authorization: Bearer 0123456789abcdeF"],
        &["Authorization: Bearer 0123456789abcdef0"],
        &["Authorization: 0123456789abcdef"],
        &["Authorization: Bearer "],
    ] {
        let response = post(headers).await;
        assert_eq!((response.status, response.error().0.as_str()), (401, "invalid_api_key"));
    }
    for path in ["/v1/models", "/metrics", "/"] {
        assert_eq!(served.get(path).await.status, 401, "{path}");
    }
    assert_eq!(served.get("/health").await.status, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_on_top_of_the_queue_are_sent_away() {
    let served = Served::start(whole(), ServeConfig { queue: 1, ..greedy() }).await;
    let fields = json!({ "max_tokens": served.engine.context() - 64, "stream": true });
    let body = completion(PROMPT, fields).to_string();
    let head = post_head("/v1/completions", &[], body.len());
    let mut first = Stream::open(served.address, &head, body.as_bytes()).await;
    first.event().await.expect("a token");
    // Of two more, one waits and one is sent away. Once that is known, the first reader goes.
    let short = completion(PROMPT, json!({ "max_tokens": 1 }));
    let mut one = Box::pin(served.post("/v1/completions", &short));
    let mut other = Box::pin(served.post("/v1/completions", &short));
    let (refused, waits) = tokio::select! {
        refused = &mut one => (refused, other),
        refused = &mut other => (refused, one),
    };
    assert_eq!((refused.status, refused.error().0.as_str()), (503, "overloaded"));
    assert!(refused.header("retry-after").is_some());
    drop(first);
    assert_eq!(waits.await.status, 200);
}
