//! What a device tells a server about itself: its token and the name of the call, and nothing else.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use outrigger::{Engine, EngineConfig};
use outrigger_proto::v1::ForwardRequest;
use outrigger_server::{ServerConfig, Tenants};
use outrigger_tests::double::pretend;
use outrigger_tests::loopback::LoopbackServer;
use outrigger_tests::{first_token, fixtures, greedy, quarter};
use tokio::task::JoinSet;
use tonic::{Request, Status};

const TOKEN: &str = "a-token-of-this-device";

fn config(address: SocketAddr, token: Option<&str>) -> EngineConfig {
    let token = token.map(|token| token.parse().expect("a token"));
    EngineConfig { token, ..quarter(vec![address.to_string()]) }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn only_a_device_that_is_known_is_served() {
    let tokens = tempfile::NamedTempFile::new().expect("a file");
    std::fs::write(&tokens, format!("device {TOKEN}")).expect("it is written");
    let tenants = Tenants::read(tokens.path()).expect("a tenant");
    let model = fixtures::demo_model();
    let known = ServerConfig { tenants: Some(tenants), ..LoopbackServer::config(&model) };
    let server = LoopbackServer::start_with(known, None).await;
    let first = first_token(config(server.address, Some(TOKEN))).await;
    assert_eq!(first.coverage, 1.0, "{first:?}");
    for token in [None, Some("a-token-of-that-device")] {
        let first = first_token(config(server.address, token)).await;
        assert!(first.coverage < 1.0, "{token:?}");
        assert!(first.fault.expect("a reason").contains("bearer token"), "{token:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sessions_that_share_a_connection_wait_for_a_stream_of_it() {
    let model = fixtures::demo_model();
    let one = ServerConfig { max_streams: 1, ..LoopbackServer::config(&model) };
    let server = LoopbackServer::start_with(one, None).await;
    let deadline = Duration::from_secs(60);
    let config = EngineConfig { deadline, ..config(server.address, None) };
    let engine = Engine::open(config).await.expect("it opens");
    assert!(engine.wait_connected(Duration::from_secs(30)).await);
    let mut apps = JoinSet::new();
    for _ in 0..4 {
        let mut session = greedy(&engine);
        apps.spawn(async move {
            session.push_text("Once upon a time").expect("it fits");
            for _ in 0..4 {
                let token = session.step().await.expect("a token");
                assert_eq!(token.coverage, 1.0, "{:?}", token.fault);
            }
        });
    }
    apps.join_all().await;
}

/// A name and a value of a call's metadata.
fn format_pair(name: &impl ToString, value: &impl AsRef<[u8]>) -> (String, String) {
    (name.to_string(), String::from_utf8_lossy(value.as_ref()).into_owned())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_call_brings_its_name_and_the_token() {
    let seen = Arc::new(Mutex::new(Vec::new()));
    let noted = seen.clone();
    let address = pretend(move |request: Request<ForwardRequest>| {
        let headers = request.metadata().clone().into_headers();
        let pairs = headers.iter().map(|(name, value)| format_pair(name, value));
        noted.lock().expect("not poisoned").push(pairs.collect::<Vec<_>>());
        Err(Status::unavailable("a witness"))
    })
    .await;
    let engine = Engine::open(config(address, Some(TOKEN))).await.expect("it opens");
    assert!(engine.wait_connected(Duration::from_secs(5)).await);
    let mut session = greedy(&engine);
    session.push_text("Once upon a time").expect("it fits");
    session.step().await.expect("a token");
    let seen = seen.lock().expect("not poisoned");
    let value = |name: &str| {
        seen[0].iter().find(|pair| pair.0 == name).map(|pair| pair.1.as_str()).expect(name)
    };
    assert_eq!(value("authorization"), format!("Bearer {TOKEN}"));
    assert_eq!(value("x-request-id"), "t0-l0");
    let mut names: Vec<&str> = seen[0].iter().map(|pair| pair.0.as_str()).collect();
    names.sort_unstable();
    assert_eq!(names, ["authorization", "content-type", "te", "user-agent", "x-request-id"]);
}
