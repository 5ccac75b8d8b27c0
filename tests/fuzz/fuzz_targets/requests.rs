//! Any bytes are a request or an error: the server's answer is whole, its refusal says why, and it goes on.
//!
//! The first byte chooses `Describe` or `Forward`; the rest is the message. A `Forward` that can be decoded is also sent
//! with this model's fingerprint, which no fuzzer would guess.
#![no_main]

use std::cell::RefCell;

use bytes::Bytes;
use libfuzzer_sys::fuzz_target;
use outrigger_fuzz::{Raw, Wire, tiny_model};
use outrigger_proto::encoding::decode_sums;
use outrigger_proto::v1::{DescribeResponse, ForwardRequest, ForwardResponse};
use outrigger_server::{Compute, ExpertServer, ServerConfig};
use prost::Message as _;
use tokio::runtime::Runtime;
use tokio_stream::wrappers::UnboundedReceiverStream;
use tonic::client::Grpc;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Request, Status};

const WIDTH: usize = 64;

struct Server {
    runtime: Runtime,
    client: Grpc<Channel>,
    fingerprint: Bytes,
}

thread_local! {
    static SERVER: RefCell<Server> = RefCell::new(Server::start());
}

impl Server {
    fn start() -> Server {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build();
        let runtime = runtime.expect("a runtime");
        let config = ServerConfig {
            model: tiny_model(),
            compute: Compute::Inline,
            threads: 1,
            ..ServerConfig::default()
        };
        let server = ExpertServer::open(config).expect("the model opens");
        let fingerprint = Bytes::copy_from_slice(server.fingerprint().as_bytes());
        let (wire, accepted) = Wire::new();
        let incoming = UnboundedReceiverStream::new(accepted);
        runtime.spawn(server.serve(incoming, None, std::future::pending()));
        let client = {
            let _entered = runtime.enter();
            Grpc::new(wire.dial(Endpoint::from_static("http://server:7070")))
        };
        Server { runtime, client, fingerprint }
    }

    fn call(&mut self, path: &'static str, message: Bytes) -> Result<Bytes, Status> {
        self.runtime.block_on(async {
            self.client.ready().await.expect("the server is there");
            let path = tonic::codegen::http::uri::PathAndQuery::from_static(path);
            let answer = self.client.unary(Request::new(message), path, Raw).await?;
            Ok(answer.into_inner())
        })
    }

    fn describe(&mut self, message: &[u8]) {
        let message = Bytes::copy_from_slice(message);
        match self.call("/outrigger.v1.Experts/Describe", message) {
            Ok(answer) => {
                let answer = DescribeResponse::decode(answer).expect("a description");
                assert_eq!(answer.fingerprint, self.fingerprint);
            }
            Err(status) => assert_eq!(status.code(), Code::Internal, "{status}"),
        }
    }

    fn forward(&mut self, message: Bytes) {
        let request = ForwardRequest::decode(message.clone());
        match (self.call("/outrigger.v1.Experts/Forward", message), request) {
            (Ok(answer), Ok(request)) => {
                let answer = ForwardResponse::decode(answer).expect("an answer");
                assert_eq!(answer.request_id, request.request_id);
                assert_eq!((answer.layer, answer.rows), (request.layer, request.rows));
                let rows = answer.rows as usize;
                decode_sums(answer.encoding(), rows, WIDTH, &answer.sums).expect("finite sums");
                assert!(answer.not_run.is_empty(), "it holds every expert");
            }
            (Err(status), Ok(_)) => {
                let refusals = [Code::InvalidArgument, Code::FailedPrecondition, Code::DataLoss];
                assert!(refusals.contains(&status.code()), "{status}");
                assert!(!status.message().is_empty(), "a reason");
            }
            // What cannot be decoded.
            (Err(status), Err(_)) => assert_eq!(status.code(), Code::Internal, "{status}"),
            (Ok(_), Err(error)) => panic!("answered, but {error}"),
        }
    }
}

fuzz_target!(|data: &[u8]| {
    let Some((kind, message)) = data.split_first() else { return };
    SERVER.with_borrow_mut(|server| {
        if kind % 8 == 0 {
            return server.describe(message);
        }
        server.forward(Bytes::copy_from_slice(message));
        if let Ok(mut request) = ForwardRequest::decode(message) {
            request.fingerprint = server.fingerprint.clone();
            server.forward(request.encode_to_vec().into());
        }
    });
});
