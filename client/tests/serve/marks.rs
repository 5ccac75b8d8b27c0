//! What is said of answers that miss experts.

use std::net::SocketAddr;
use std::time::Duration;

use outrigger::proxy::{Conditions, FaultProxy, LinkFault};
use outrigger::{EngineConfig, OnMiss, Reply};
use outrigger_server::{ExpertServer, ServerConfig};
use serde_json::{Value, json};

use crate::common::{LONG, Served, Stream, completion, demo, greedy, post_head, quarter};

const PROMPT: &str = "Once upon a time there was a king who";

/// A server of all experts, behind a link that can be cut.
async fn server() -> FaultProxy {
    let config = ServerConfig { model: demo(), threads: 1, ..ServerConfig::default() };
    let server = ExpertServer::open(config).expect("it opens");
    let any_port = SocketAddr::from(([127, 0, 0, 1], 0));
    let incoming = outrigger_server::bind(any_port).await.expect("a free port");
    let address = incoming.local_addr().expect("it listens");
    tokio::spawn(server.serve(incoming, None, std::future::pending()));
    FaultProxy::start(any_port, address.to_string()).await.expect("a free port")
}

fn cut(state: LinkFault) -> Conditions {
    Conditions { state, ..Conditions::default() }
}

/// A device with a quarter of the experts, and a server for the others.
async fn connected(config: EngineConfig, link: &FaultProxy) -> Served {
    let config = EngineConfig { servers: vec![link.address().to_string()], ..config };
    let served = Served::start(config, greedy()).await;
    assert!(served.engine.wait_connected(LONG).await, "the server is up");
    served
}

fn patient() -> EngineConfig {
    EngineConfig { deadline: Duration::from_secs(5), ..quarter(Vec::new()) }
}

/// Whether marks say that nothing is missing; they must agree with each other.
fn is_exact(marks: &Value) -> bool {
    let provisional = marks["provisional"].as_bool().expect("a mark");
    let least = marks["least_coverage"].as_f64().expect("a mark");
    assert!(marks["coverage"].as_f64().expect("a mark") >= least, "{marks}");
    assert!(provisional || (least == 1.0 && marks["fault"].is_null()), "{marks}");
    !provisional
}

#[tokio::test(flavor = "multi_thread")]
async fn with_a_server_answers_are_exact_and_those_of_the_full_model() {
    let link = server().await;
    let (device, full) = (connected(patient(), &link).await, Served::demo().await);
    let fields = json!({ "max_tokens": 16 });
    let answer = device.complete(PROMPT, fields.clone()).await.json();
    assert!(is_exact(&answer["choices"][0]["outrigger"]), "{answer}");
    assert_eq!(answer["usage"]["outrigger"]["exact"], true);
    assert_eq!(answer["choices"], full.complete(PROMPT, fields).await.json()["choices"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn answers_of_sums_that_servers_round_are_not_called_exact() {
    let link = server().await;
    let device = connected(EngineConfig { reply: Reply::F16, ..patient() }, &link).await;
    let answer = device.complete(PROMPT, json!({ "max_tokens": 4 })).await.json();
    let (choice, usage) = (&answer["choices"][0]["outrigger"], &answer["usage"]["outrigger"]);
    assert_eq!((&choice["coverage"], &choice["exact"]), (&json!(1.0), &json!(false)), "{answer}");
    assert_eq!(usage["exact"], false, "{answer}");
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_server_every_part_is_marked() {
    let served = Served::start(quarter(Vec::new()), greedy()).await;
    let response = served.complete(PROMPT, json!({ "max_tokens": 16 })).await;
    assert_eq!(response.header("outrigger-exact"), Some("false"));
    let answer = response.json();
    for marks in [&answer["choices"][0]["outrigger"], &answer["usage"]["outrigger"]] {
        assert_eq!((&marks["exact"], &marks["tokens"]), (&json!(false), &json!(16)), "{marks}");
        assert!(!is_exact(marks) && marks["fault"].is_string(), "{marks}");
        assert!(marks["coverage"].as_f64().is_some_and(|coverage| coverage < 1.0), "{marks}");
    }

    let fields =
        json!({ "max_tokens": 16, "stream": true, "stream_options": { "include_usage": true } });
    let events = served.complete(PROMPT, fields).await.events();
    let (usage, pieces) = events.split_last().expect("there are some");
    let marks: Vec<&Value> = pieces.iter().map(|p| &p["choices"][0]["outrigger"]).collect();
    assert!(marks.iter().all(|marks| !is_exact(marks)), "{marks:?}");
    let (end, texts) = marks.split_last().expect("there are some");
    let told: u64 = texts.iter().filter_map(|marks| marks["tokens"].as_u64()).sum();
    assert_eq!((told, &end["exact"]), (16, &json!(false)));
    assert_eq!(usage["usage"]["outrigger"], **end);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_dies_in_an_answer_shows_from_there_on() {
    let link = server().await;
    let served = connected(patient(), &link).await;
    let body = completion(PROMPT, json!({ "max_tokens": 400, "stream": true })).to_string();
    let head = post_head("/v1/completions", &[], body.len());
    let mut stream = Stream::open(served.address, &head, body.as_bytes()).await;
    let mut marks = Vec::new();
    while let Some(event) = stream.event().await {
        marks.push(event["choices"][0]["outrigger"].clone());
        if marks.len() == 5 {
            link.set(cut(LinkFault::Refused));
        }
    }
    assert!(marks[..5].iter().all(is_exact), "{marks:?}");
    let end = marks.pop().expect("an end");
    assert_eq!(end["exact"], false, "the answer as a whole is not");
    assert!(!is_exact(marks.last().expect("text")), "nor is what was said last");
    let faults = marks.iter().filter(|marks| marks["fault"].is_string());
    assert!(faults.count() > 0, "and why is said");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_computed_alone_is_computed_again_with_a_server() {
    let link = server().await;
    let (device, full) = (connected(patient(), &link).await, Served::demo().await);
    let answer = async |served: &Served| {
        let answer = served.complete(PROMPT, json!({ "max_tokens": 16 })).await.json();
        answer["choices"][0].clone()
    };
    device.engine.set_offline(true);
    let alone = answer(&device).await;
    assert_eq!(alone["outrigger"]["exact"], false);
    device.engine.set_offline(false);
    assert!(device.engine.wait_connected(LONG).await, "the server is back");
    assert_eq!(answer(&device).await, answer(&full).await);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_that_may_miss_nothing_is_an_error() {
    let config = EngineConfig { on_miss: OnMiss::Fail, ..quarter(Vec::new()) };
    let served = Served::start(config, greedy()).await;
    for stream in [false, true] {
        let response = served.complete(PROMPT, json!({ "stream": stream })).await;
        assert_eq!((response.status, response.error().0.as_str()), (503, "experts_missing"));
        assert!(response.header("retry-after").is_some());
    }
}

/// The work waits for a server, as it may for an hour: it is given up with its reader, and the next one has its place.
#[tokio::test(flavor = "multi_thread")]
async fn a_reader_that_goes_away_is_not_waited_for() {
    let link = server().await;
    let config = EngineConfig { on_miss: OnMiss::Wait, ..quarter(Vec::new()) };
    let served = connected(config, &link).await;
    let body = completion(PROMPT, json!({ "max_tokens": 900, "stream": true })).to_string();
    let head = post_head("/v1/completions", &[], body.len());
    let mut reader = Stream::open(served.address, &head, body.as_bytes()).await;
    reader.event().await.expect("a token");
    link.set(cut(LinkFault::Silent));
    drop(reader);

    let next = Stream::open(served.address, &head, body.as_bytes());
    tokio::pin!(next);
    // Its turn comes while nothing passes, so that nothing but its own wait is in the way.
    let waits = tokio::time::timeout(Duration::from_secs(1), &mut next).await;
    link.set(Conditions::default());
    let mut next = match waits {
        Ok(next) => next,
        Err(_) => next.await,
    };
    assert_eq!(next.status, 200);
    assert!(is_exact(&next.event().await.expect("a token")["choices"][0]["outrigger"]));
    drop(next);
    let tokens = served.tokens().await;
    assert!(tokens < 900, "{tokens} tokens: the first one was finished for nobody");
}
