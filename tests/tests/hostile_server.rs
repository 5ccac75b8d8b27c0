//! A server that answers wrongly is never believed: degraded output and a reason, whatever it says.

use std::net::SocketAddr;
use std::time::Duration;

use outrigger::{Budget, Elsewhere, Engine, EngineConfig, LinkState, Model};
use outrigger_proto::encoding::{encode_f32, encode_f48};
use outrigger_proto::v1::experts_server::{Experts, ExpertsServer};
use outrigger_proto::v1::{
    DescribeRequest, DescribeResponse, Encoding, ForwardRequest, ForwardResponse, Held,
};
use outrigger_tests::{fixtures, greedy};
use tonic::{Request, Response, Status};

/// How it lies.
#[derive(Clone, Copy, Debug)]
enum Lie {
    NotANumber,
    Infinity,
    TooFewRows,
    TooFewBytes,
    AnotherRequest,
    AnotherLayer,
    ExpertsNobodyAskedFor,
    NoSuchEncoding,
}

const LIES: [Lie; 8] = [
    Lie::NotANumber,
    Lie::Infinity,
    Lie::TooFewRows,
    Lie::TooFewBytes,
    Lie::AnotherRequest,
    Lie::AnotherLayer,
    Lie::ExpertsNobodyAskedFor,
    Lie::NoSuchEncoding,
];

/// Describes itself truthfully and lies in every answer.
struct Liar {
    description: DescribeResponse,
    lie: Lie,
}

#[tonic::async_trait]
impl Experts for Liar {
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
        let request = request.into_inner();
        let values = request.rows as usize * self.description.width as usize;
        let mut answer = ForwardResponse {
            request_id: request.request_id,
            layer: request.layer,
            rows: request.rows,
            encoding: Encoding::F48.into(),
            sums: encode_f48(&vec![0.5; values]),
            not_run: Vec::new(),
            compute_us: 1,
        };
        match self.lie {
            Lie::NotANumber => answer.sums = encode_f48(&vec![f64::NAN; values]),
            Lie::Infinity => {
                answer.encoding = Encoding::F32.into();
                answer.sums = encode_f32(&vec![f32::INFINITY; values]);
            }
            Lie::TooFewRows => answer.rows = 0,
            Lie::TooFewBytes => answer.sums = encode_f48(&vec![0.5; values - 1]),
            Lie::AnotherRequest => answer.request_id += 1,
            Lie::AnotherLayer => answer.layer += 1,
            Lie::ExpertsNobodyAskedFor => answer.not_run = vec![70_000],
            Lie::NoSuchEncoding => answer.encoding = 99,
        }
        Ok(Response::new(answer))
    }
}

async fn start(lie: Lie) -> SocketAddr {
    let model = Model::open(&fixtures::demo_model()).expect("it opens");
    let (layers, experts) = (model.spec.n_layers as u32, model.spec.n_experts as u32);
    let description = DescribeResponse {
        fingerprint: model.gguf.fingerprint().as_bytes().to_vec().into(),
        layers,
        experts,
        width: model.spec.n_embd as u32,
        held: vec![Held {
            first_layer: 0,
            last_layer: layers - 1,
            first_expert: 0,
            last_expert: experts - 1,
        }],
        ..DescribeResponse::default()
    };
    let any_port = SocketAddr::from(([127, 0, 0, 1], 0));
    let incoming = outrigger_server::bind(any_port).await.expect("loopback has ports");
    let address = incoming.local_addr().expect("it is bound");
    let liar = ExpertsServer::new(Liar { description, lie });
    let server = tonic::transport::Server::builder().add_service(liar);
    tokio::spawn(server.serve_with_incoming(incoming));
    address
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_lie_is_merged() {
    // What the device says with nobody to ask.
    let config = |servers: Vec<String>| {
        let mut config = EngineConfig::new(fixtures::demo_model());
        config.servers = servers;
        config.expert_cache = Budget::Fraction(0.25);
        config.elsewhere = Elsewhere::Absent;
        config.deadline = Duration::from_secs(20);
        config
    };
    let alone = Engine::open(config(Vec::new())).await.expect("it opens");
    let mut expected = greedy(&alone);
    expected.push_text("Once upon a time").expect("it fits");
    expected.step().await.expect("a token");

    for lie in LIES {
        let address = start(lie).await;
        let engine = Engine::open(config(vec![address.to_string()])).await.expect("it opens");
        assert!(engine.wait_connected(Duration::from_secs(5)).await, "{lie:?}: it looks well");
        let mut session = greedy(&engine);
        session.push_text("Once upon a time").expect("it fits");
        let token = session.step().await.expect("a token");
        assert!(token.coverage < 1.0 && token.provisional, "{lie:?}: {token:?}");
        assert_eq!(token.tally.remote, 0, "{lie:?}: {token:?}");
        let fault = token.fault.expect("a reason");
        assert!(fault.contains("bad answer"), "{lie:?}: {fault}");
        assert_eq!(session.logits(), expected.logits(), "{lie:?}: nothing of it was merged");
        assert_ne!(engine.servers()[0].state, LinkState::Up, "{lie:?}: it is left alone");
    }
}
