//! Whatever a server answers, tokens go on: marked where an answer was not to be believed.
//!
//! The input is a list of messages, each behind its length in two bytes: first how the server describes itself, then its
//! answers to `Forward`, over and over. A first byte that is odd means an honest description. An answer that can be
//! decoded has its request's id, which no fuzzer would guess, where that byte's second bit is set.
#![no_main]

use std::convert::Infallible;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, LazyLock, Mutex};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use libfuzzer_sys::fuzz_target;
use outrigger::{Budget, Dial, Elsewhere, Engine, EngineConfig, Model, SamplerConfig};
use outrigger_fuzz::{Raw, Wire, tiny_model};
use outrigger_proto::v1::{DescribeResponse, ForwardRequest, ForwardResponse, Held};
use prost::Message as _;
use tokio::runtime::Runtime;
use tokio_stream::wrappers::UnboundedReceiverStream;
use tonic::body::Body;
use tonic::codegen::{BoxFuture, Service, http};
use tonic::server::{Grpc, NamedService};
use tonic::{Request, Response, Status};

const DEADLINE: Duration = Duration::from_millis(100);

static HONEST: LazyLock<Bytes> = LazyLock::new(|| {
    let model = Model::open(&tiny_model()).expect("it opens");
    let description = DescribeResponse {
        fingerprint: Bytes::copy_from_slice(model.gguf.fingerprint().as_bytes()),
        layers: model.spec.n_layers as u32,
        experts: model.spec.n_experts as u32,
        width: model.spec.n_embd as u32,
        held: vec![Held { first_layer: 0, last_layer: 99, first_expert: 0, last_expert: 99 }],
        ..DescribeResponse::default()
    };
    description.encode_to_vec().into()
});

/// A server that says what the input says.
#[derive(Clone)]
struct Puppet {
    description: Bytes,
    answers: Arc<Vec<Bytes>>,
    said: Arc<AtomicUsize>,
    patch: bool,
}

impl Puppet {
    fn of(data: &[u8]) -> Option<Puppet> {
        let (flags, mut rest) = data.split_first()?;
        let mut messages = Vec::new();
        while let Some((length, after)) = rest.split_first_chunk::<2>() {
            let length = usize::from(u16::from_le_bytes(*length)).min(after.len());
            messages.push(Bytes::copy_from_slice(&after[..length]));
            rest = &after[length..];
        }
        let honest = flags & 1 == 1;
        let described = if messages.is_empty() { Bytes::new() } else { messages.remove(0) };
        Some(Puppet {
            description: if honest { HONEST.clone() } else { described },
            answers: Arc::new(messages),
            said: Arc::default(),
            patch: flags & 2 == 2,
        })
    }

    fn forward(&self, request: Bytes) -> Bytes {
        let turn = self.said.fetch_add(1, Ordering::Relaxed);
        let Some(answer) = self.answers.get(turn % self.answers.len().max(1)) else {
            return Bytes::new();
        };
        let request = ForwardRequest::decode(request).expect("the device speaks the protocol");
        match ForwardResponse::decode(answer.clone()) {
            Ok(mut decoded) if self.patch => {
                decoded.request_id = request.request_id;
                decoded.layer = request.layer;
                decoded.encode_to_vec().into()
            }
            _ => answer.clone(),
        }
    }
}

/// Where the puppet is that answers.
#[derive(Clone)]
struct Stage(Arc<Mutex<Puppet>>);

impl Stage {
    fn enter(&self, puppet: Puppet) {
        *self.0.lock().expect("nothing panics under this lock") = puppet;
    }
}

impl NamedService for Stage {
    const NAME: &'static str = "outrigger.v1.Experts";
}

impl Service<http::Request<Body>> for Stage {
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = BoxFuture<http::Response<Body>, Infallible>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        let puppet = self.0.lock().expect("nothing panics under this lock").clone();
        Box::pin(async move {
            let forward = request.uri().path().ends_with("/Forward");
            let answer = move |message: Request<Bytes>| {
                let answer = match forward {
                    true => puppet.forward(message.into_inner()),
                    false => puppet.description.clone(),
                };
                std::future::ready(Ok::<_, Status>(Response::new(answer)))
            };
            Ok(Grpc::new(Raw).unary(tower::service_fn(answer), request).await)
        })
    }
}

/// A device whose server is whatever puppet is there.
struct World {
    runtime: Runtime,
    engine: Arc<Engine>,
    stage: Stage,
}

thread_local! {
    static WORLD: World = World::begin();
}

impl World {
    fn begin() -> World {
        let runtime =
            tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build();
        let runtime = runtime.expect("a runtime");
        let (wire, accepted) = Wire::new();
        let incoming = UnboundedReceiverStream::new(accepted);
        let stage = Stage(Arc::new(Mutex::new(Puppet::of(&[1]).expect("a byte"))));
        let serving = tonic::transport::Server::builder().add_service(stage.clone());
        runtime.spawn(serving.serve_with_incoming(incoming));
        let mut config = EngineConfig::new(tiny_model());
        config.servers = vec!["server:7070".to_owned()];
        config.expert_cache = Budget::Fraction(0.25);
        config.elsewhere = Elsewhere::Absent;
        config.deadline = DEADLINE;
        config.threads = 1;
        config.context = Some(16);
        config.dial = Dial::new(move |endpoint| wire.dial(endpoint));
        let engine = runtime.block_on(Engine::open(config)).expect("the model opens");
        World { runtime, engine, stage }
    }

    /// A server that gave no answer is asked again a minute later, and describes itself anew.
    fn replace(&self, puppet: Puppet) {
        self.stage.enter(Puppet::of(&[1]).expect("a byte"));
        self.write(1);
        self.stage.enter(puppet);
        self.runtime.block_on(async { tokio::time::sleep(Duration::from_secs(63)).await });
    }

    fn write(&self, tokens: usize) {
        let mut session = self.engine.session(SamplerConfig::greedy()).expect("greedy is valid");
        session.push(&[18, 139, 71]).expect("it fits");
        for _ in 0..tokens {
            let token = self.runtime.block_on(session.step()).expect("a lie is no error");
            assert!((0.0..=1.0).contains(&token.coverage), "{token:?}");
            assert_eq!(token.coverage == 1.0, token.tally.missing == 0, "{token:?}");
            assert!((token.id as usize) < self.engine.spec().n_vocab, "{token:?}");
            assert!(token.elapsed <= DEADLINE + Duration::from_millis(5), "{token:?}");
        }
    }
}

fuzz_target!(|data: &[u8]| {
    let Some(puppet) = Puppet::of(data) else { return };
    WORLD.with(|world| {
        world.replace(puppet);
        world.write(4);
    });
});
