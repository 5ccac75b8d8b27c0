//! What a device tells a server about itself: its token and the name of the call, and nothing else.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use outrigger::{Budget, Elsewhere, Engine, EngineConfig, Model};
use outrigger_proto::v1::experts_server::{Experts, ExpertsServer};
use outrigger_proto::v1::{
    DescribeRequest, DescribeResponse, ForwardRequest, ForwardResponse, Held,
};
use outrigger_server::{ServerConfig, Tenants};
use outrigger_tests::loopback::LoopbackServer;
use outrigger_tests::{fixtures, greedy};
use tokio::task::JoinSet;
use tonic::{Request, Response, Status};

const TOKEN: &str = "a-token-of-this-device";

fn config(address: SocketAddr, token: Option<&str>) -> EngineConfig {
    let mut config = EngineConfig::new(fixtures::demo_model());
    config.servers = vec![address.to_string()];
    config.token = token.map(|token| token.parse().expect("a token"));
    config.expert_cache = Budget::Fraction(0.25);
    config.elsewhere = Elsewhere::Absent;
    config.deadline = Duration::from_secs(5);
    config
}

async fn first_coverage(config: EngineConfig) -> (f32, Option<String>) {
    let engine = Engine::open(config).await.expect("it opens");
    let mut session = greedy(&engine);
    session.push_text("Once upon a time").expect("it fits");
    let token = session.step().await.expect("a token");
    (token.coverage, token.fault)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn only_a_device_that_is_known_is_served() {
    let tenants = Tenants::parse(&format!("device {TOKEN}")).expect("a tenant");
    let model = fixtures::demo_model();
    let known = ServerConfig { tenants: Some(tenants), ..LoopbackServer::config(&model) };
    let server = LoopbackServer::start_with(known, None).await;
    let (coverage, fault) = first_coverage(config(server.address, Some(TOKEN))).await;
    assert_eq!(coverage, 1.0, "{fault:?}");
    for token in [None, Some("a-token-of-that-device")] {
        let (coverage, fault) = first_coverage(config(server.address, token)).await;
        assert!(coverage < 1.0, "{token:?}");
        assert!(fault.expect("a reason").contains("bearer token"), "{token:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sessions_that_share_a_connection_wait_for_a_stream_of_it() {
    let model = fixtures::demo_model();
    let one = ServerConfig { max_streams: 1, ..LoopbackServer::config(&model) };
    let server = LoopbackServer::start_with(one, None).await;
    let mut config = config(server.address, None);
    config.deadline = Duration::from_secs(60);
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

/// A call's metadata, names and values.
type Headers = Vec<(String, String)>;

/// Takes down what calls bring with them, and answers none.
struct Witness {
    description: DescribeResponse,
    seen: Arc<Mutex<Vec<Headers>>>,
}

#[tonic::async_trait]
impl Experts for Witness {
    async fn describe(
        &self,
        _: Request<DescribeRequest>,
    ) -> Result<Response<DescribeResponse>, Status> {
        Ok(Response::new(self.description.clone()))
    }

    async fn forward(
        &self,
        request: Request<ForwardRequest>,
    ) -> Result<Response<ForwardResponse>, Status> {
        let headers = request.metadata().clone().into_headers();
        let pair = |(name, value): (&_, &_)| format_pair(name, value);
        self.seen.lock().expect("not poisoned").push(headers.iter().map(pair).collect());
        Err(Status::unavailable("a witness"))
    }
}

fn format_pair(name: &impl ToString, value: &impl AsRef<[u8]>) -> (String, String) {
    (name.to_string(), String::from_utf8_lossy(value.as_ref()).into_owned())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_call_brings_its_name_and_the_token() {
    let model = Model::open(&fixtures::demo_model()).expect("it opens");
    let spec = &model.spec;
    let description = DescribeResponse {
        fingerprint: model.gguf.fingerprint().as_bytes().to_vec().into(),
        layers: spec.n_layers as u32,
        experts: spec.n_experts as u32,
        width: spec.n_embd as u32,
        held: vec![Held {
            first_layer: 0,
            last_layer: spec.n_layers as u32 - 1,
            first_expert: 0,
            last_expert: spec.n_experts as u32 - 1,
        }],
        ..DescribeResponse::default()
    };
    let any_port = SocketAddr::from(([127, 0, 0, 1], 0));
    let incoming = outrigger_server::bind(any_port).await.expect("loopback has ports");
    let address = incoming.local_addr().expect("it is bound");
    let seen = Arc::new(Mutex::new(Vec::new()));
    let witness = ExpertsServer::new(Witness { description, seen: seen.clone() });
    let server = tonic::transport::Server::builder().add_service(witness);
    tokio::spawn(server.serve_with_incoming(incoming));

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
