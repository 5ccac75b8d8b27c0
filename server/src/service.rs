//! `outrigger.v1.Experts`.

use std::sync::{Arc, Mutex};

use outrigger_proto::v1::experts_server::Experts;
use outrigger_proto::v1::{DescribeRequest, DescribeResponse, ForwardRequest, ForwardResponse};
use tonic::{Request, Response, Status};

use crate::engine::{Engine, Sums};
use crate::queue::Queue;
use crate::request::{Work, check};
use crate::shard::Shard;

/// The service, over one part of one model.
pub(crate) struct Service {
    pub(crate) shard: Arc<Shard>,
    pub(crate) runner: Runner,
}

/// Where work is computed: see [`crate::Compute`].
pub(crate) enum Runner {
    Thread(Queue),
    Inline(Box<Mutex<Engine>>),
}

impl Runner {
    async fn run(&self, work: Work) -> Result<Sums, Status> {
        match self {
            Runner::Thread(queue) => queue.run(work).await,
            Runner::Inline(engine) => {
                let mut engine = engine.lock().map_err(|_| Status::internal("a batch panicked"))?;
                engine.run(&[&work]).remove(0)
            }
        }
    }
}

#[tonic::async_trait]
impl Experts for Service {
    async fn describe(
        &self,
        _request: Request<DescribeRequest>,
    ) -> Result<Response<DescribeResponse>, Status> {
        Ok(Response::new(self.shard.describe()))
    }

    async fn forward(
        &self,
        request: Request<ForwardRequest>,
    ) -> Result<Response<ForwardResponse>, Status> {
        let request = request.into_inner();
        let (request_id, layer, rows) = (request.request_id, request.layer, request.rows);
        let (work, mut not_run) = check(&self.shard, request)?;
        let sums = self.runner.run(work).await?;
        not_run.extend(sums.unreadable);
        not_run.sort_unstable();
        Ok(Response::new(ForwardResponse {
            request_id,
            layer,
            rows,
            encoding: sums.encoding.into(),
            sums: sums.bytes,
            not_run,
            compute_us: sums.compute_us,
        }))
    }
}
