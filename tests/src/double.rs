//! A server that is none: it describes the demo model truthfully, and answers what a test says.

use std::net::SocketAddr;

use outrigger::Model;
use outrigger_proto::v1::experts_server::{Experts, ExpertsServer};
use outrigger_proto::v1::{
    DescribeRequest, DescribeResponse, ForwardRequest, ForwardResponse, Held,
};
use tonic::{Request, Response, Status};

use crate::fixtures::demo_model;

/// Serves `experts` on a loopback port until the runtime ends.
pub async fn serve(experts: impl Experts) -> SocketAddr {
    let any_port = SocketAddr::from(([127, 0, 0, 1], 0));
    let incoming = outrigger_server::bind(any_port).await.expect("loopback has ports");
    let address = incoming.local_addr().expect("it is bound");
    let server = tonic::transport::Server::builder().add_service(ExpertsServer::new(experts));
    tokio::spawn(server.serve_with_incoming(incoming));
    address
}

/// Serves a double of a server of the demo model, which answers each call with what `answer` makes of it.
pub async fn pretend<F>(answer: F) -> SocketAddr
where
    F: Fn(Request<ForwardRequest>) -> Result<ForwardResponse, Status> + Send + Sync + 'static,
{
    serve(Double { answer }).await
}

struct Double<F> {
    answer: F,
}

#[tonic::async_trait]
impl<F> Experts for Double<F>
where
    F: Fn(Request<ForwardRequest>) -> Result<ForwardResponse, Status> + Send + Sync + 'static,
{
    async fn describe(
        &self,
        _: Request<DescribeRequest>,
    ) -> Result<Response<DescribeResponse>, Status> {
        Ok(Response::new(description()))
    }

    async fn forward(
        &self,
        request: Request<ForwardRequest>,
    ) -> Result<Response<ForwardResponse>, Status> {
        (self.answer)(request).map(Response::new)
    }
}

/// The whole demo model.
fn description() -> DescribeResponse {
    let model = Model::open(&demo_model()).expect("it opens");
    let (layers, experts) = (model.spec.n_layers as u32, model.spec.n_experts as u32);
    let (last_layer, last_expert) = (layers - 1, experts - 1);
    DescribeResponse {
        fingerprint: model.gguf.fingerprint().as_bytes().to_vec().into(),
        layers,
        experts,
        width: model.spec.n_embd as u32,
        held: vec![Held { first_layer: 0, last_layer, first_expert: 0, last_expert }],
        ..DescribeResponse::default()
    }
}
