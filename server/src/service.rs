//! `outrigger.v1.Experts`.

use std::sync::{Arc, Mutex};
use std::time::Instant;

use outrigger_proto::REQUEST_ID;
use outrigger_proto::v1::experts_server::Experts;
use outrigger_proto::v1::{DescribeRequest, DescribeResponse, ForwardRequest, ForwardResponse};
use tonic::{Code, Request, Response, Status};

use crate::connection::Due;
use crate::engine::{Engine, Sums};
use crate::metrics::Metrics;
use crate::queue::Queue;
use crate::request::{Work, check};
use crate::shard::Shard;
use crate::tenants::Tenant;

const MAX_REQUEST_ID: usize = 64;

/// The service, over one part of one model.
pub(crate) struct Service {
    pub(crate) shard: Arc<Shard>,
    pub(crate) runner: Runner,
    pub(crate) metrics: Arc<Metrics>,
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
        let started = Instant::now();
        let tenant = request.extensions().get::<Arc<Tenant>>().cloned();
        let device = Due::of(request.extensions()).map_or(0, Due::connection);
        let trace = request_id(&request);
        let request = request.into_inner();
        let layer = request.layer;
        let tenant = tenant.as_deref();
        let mut call = Call { code: Code::Cancelled, tenant, metrics: &self.metrics };
        let answer = self.answer(request, tenant, device, trace.clone()).await;
        match &answer {
            Ok(_) => {
                call.code = Code::Ok;
                self.metrics.answered(layer, started.elapsed());
            }
            Err(status) => {
                call.code = status.code();
                tracing::debug!(trace, layer, code = ?status.code(), "{}", status.message());
            }
        }
        answer.map(Response::new)
    }
}

/// A Forward call, counted when it ends, be it that its future is dropped before there is an answer.
struct Call<'a> {
    code: Code,
    tenant: Option<&'a Tenant>,
    metrics: &'a Metrics,
}

impl Drop for Call<'_> {
    fn drop(&mut self) {
        self.metrics.request(self.code, self.tenant);
    }
}

impl Service {
    async fn answer(
        &self,
        request: ForwardRequest,
        tenant: Option<&Tenant>,
        device: usize,
        trace: Option<String>,
    ) -> Result<ForwardResponse, Status> {
        let (request_id, layer, rows) = (request.request_id, request.layer, request.rows);
        let (work, mut not_run) = check(&self.shard, request, device, trace)?;
        let (expert_rows, run) = (work.expert_rows(), self.runner.run(work));
        let sums = match tenant {
            Some(tenant) => tenant.charge(expert_rows, run).await?,
            None => run.await?,
        };
        not_run.extend(sums.unreadable);
        not_run.sort_unstable();
        Ok(ForwardResponse {
            request_id,
            layer,
            rows,
            encoding: sums.encoding.into(),
            sums: sums.bytes,
            not_run,
            compute_us: sums.compute_us,
        })
    }
}

/// The device's name for the request, if it is fit to be logged.
fn request_id(request: &Request<ForwardRequest>) -> Option<String> {
    let id = request.metadata().get(REQUEST_ID)?.to_str().ok()?;
    (id.len() <= MAX_REQUEST_ID).then(|| id.to_owned())
}
