//! What the server did, counted for Prometheus.

use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::Duration;

use hyper::header::CONTENT_TYPE;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use prometheus_client::encoding::{EncodeLabelSet, text};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::{Registry, Unit};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::time::timeout;
use tonic::Code;

use crate::tenants::Tenant;

/// Scrapes at a time, and how long each may take.
const MAX_SCRAPES: usize = 16;
const SCRAPE_TIMEOUT: Duration = Duration::from_secs(5);

/// What the server did since its start.
pub struct Metrics {
    registry: Registry,
    resident_memory: Gauge,
    pub(crate) rows: Counter,
    pub(crate) expert_rows: Counter,
    pub(crate) batches: Counter,
    pub(crate) compute: Counter<f64, AtomicU64>,
    pub(crate) queue_rows: Gauge,
    pub(crate) unreadable: Counter,
    pub(crate) received: Counter,
    pub(crate) sent: Counter,
    pub(crate) connections: Gauge,
    pub(crate) connections_refused: Counter,
    pub(crate) connections_idle: Counter,
    pub(crate) connections_unread: Counter,
    pub(crate) handshakes_failed: Counter,
    pub(crate) tokens_stale: Gauge,
    pub(crate) certificate_stale: Gauge,
    pub(crate) certificate_not_after: Gauge,
    requests: Family<Outcome, Counter>,
    latency: Family<Layer, Histogram, fn() -> Histogram>,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct Outcome {
    code: String,
    /// Empty where there are no tokens.
    tenant: String,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct Layer {
    layer: u32,
}

impl Metrics {
    pub(crate) fn new() -> Metrics {
        let mut metrics = Metrics {
            registry: Registry::default(),
            resident_memory: Gauge::default(),
            rows: Counter::default(),
            expert_rows: Counter::default(),
            batches: Counter::default(),
            compute: Counter::default(),
            queue_rows: Gauge::default(),
            unreadable: Counter::default(),
            received: Counter::default(),
            sent: Counter::default(),
            connections: Gauge::default(),
            connections_refused: Counter::default(),
            connections_idle: Counter::default(),
            connections_unread: Counter::default(),
            handshakes_failed: Counter::default(),
            tokens_stale: Gauge::default(),
            certificate_stale: Gauge::default(),
            certificate_not_after: Gauge::default(),
            requests: Family::default(),
            // 125 us to 4 s.
            latency: Family::new_with_constructor(|| {
                Histogram::new(exponential_buckets(125e-6, 2.0, 16))
            }),
        };
        metrics.register();
        metrics
    }

    fn register(&mut self) {
        if resident_memory().is_some() {
            let (name, help) = ("process_resident_memory", "Memory, pages of the model included");
            self.registry.register_with_unit(name, help, Unit::Bytes, self.resident_memory.clone());
        }
        let all = self.registry.sub_registry_with_prefix("outrigger_server");
        all.register("rows", "Rows of activations computed", self.rows.clone());
        all.register("expert_rows", "Rows times experts computed", self.expert_rows.clone());
        all.register("batches", "Batches computed", self.batches.clone());
        let help = "Time that batches took to compute";
        all.register_with_unit("compute", help, Unit::Seconds, self.compute.clone());
        all.register("queue_rows", "Rows that wait to be computed", self.queue_rows.clone());
        let help = "Experts asked for that the model file could not give";
        all.register("unreadable_experts", help, self.unreadable.clone());
        let (received, sent) = (self.received.clone(), self.sent.clone());
        all.register_with_unit("received", "Read from connections", Unit::Bytes, received);
        all.register_with_unit("sent", "Written to connections", Unit::Bytes, sent);
        all.register("connections", "Open connections", self.connections.clone());
        let help = "Connections closed at once, since there were too many";
        all.register("connections_refused", help, self.connections_refused.clone());
        let help = "Connections closed for want of a request";
        all.register("connections_idle_closed", help, self.connections_idle.clone());
        let help = "Connections closed whose peer did not read its answers";
        all.register("connections_unread_closed", help, self.connections_unread.clone());
        let help = "Connections that did not come to terms about TLS";
        all.register("tls_handshakes_failed", help, self.handshakes_failed.clone());
        let help =
            "1 while the file of tokens is of no use, and the last ones that it had stay good";
        all.register("tokens_stale", help, self.tokens_stale.clone());
        let help =
            "1 while the files of the certificate are of no use, and the last good ones count";
        all.register("certificate_stale", help, self.certificate_stale.clone());
        let (name, help) =
            ("certificate_not_after_timestamp", "When the certificate expires, 0 without TLS");
        let not_after = self.certificate_not_after.clone();
        all.register_with_unit(name, help, Unit::Seconds, not_after);
        let help = "Forward calls, and any without a good token, by gRPC status: UNAVAILABLE is a \
                    full queue, RESOURCE_EXHAUSTED a quota, CANCELLED one that was given up";
        all.register("requests", help, self.requests.clone());
        let help = "From a request's head to its answer";
        all.register_with_unit("latency", help, Unit::Seconds, self.latency.clone());
    }

    /// Counts a Forward call.
    pub(crate) fn request(&self, code: Code, tenant: Option<&Tenant>) {
        let tenant = tenant.map_or_else(String::new, |tenant| tenant.name.clone());
        let code = grpc_name(code).to_owned();
        self.requests.get_or_create(&Outcome { code, tenant }).inc();
    }

    /// Counts the time of a Forward call that was answered.
    pub(crate) fn answered(&self, layer: u32, took: Duration) {
        self.latency.get_or_create(&Layer { layer }).observe(took.as_secs_f64());
    }

    /// The OpenMetrics text of it all.
    pub fn text(&self) -> String {
        self.resident_memory.set(resident_memory().unwrap_or(0));
        let mut out = String::new();
        text::encode(&mut out, &self.registry).expect("a string takes everything");
        out
    }
}

/// Bytes, from `VmRSS: N kB` in `/proc/self/status`; `None` where there is no such file.
fn resident_memory() -> Option<i64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    let kib: i64 = line.split_ascii_whitespace().next()?.parse().ok()?;
    Some(kib << 10)
}

/// Answers `GET /metrics` on `listener` with what `text` says then; never returns.
pub async fn serve_metrics(
    listener: TcpListener,
    text: impl Fn() -> String + Clone + Send + Sync + 'static,
) {
    let scrapes = Arc::new(Semaphore::new(MAX_SCRAPES));
    loop {
        let scrape = scrapes.clone().acquire_owned().await.expect("it is never closed");
        match listener.accept().await {
            Ok((stream, _)) => {
                let text = text.clone();
                tokio::spawn(async move {
                    let _ = timeout(SCRAPE_TIMEOUT, answer(stream, &text)).await;
                    drop(scrape);
                });
            }
            Err(error) => {
                tracing::warn!(%error, "cannot accept a scrape");
                tokio::time::sleep(SCRAPE_TIMEOUT).await;
            }
        }
    }
}

async fn answer(stream: TcpStream, text: &impl Fn() -> String) -> hyper::Result<()> {
    let service = service_fn(async |request: Request<hyper::body::Incoming>| {
        let response = Response::builder();
        match (request.method(), request.uri().path()) {
            (&Method::GET, "/metrics") => response
                .header(CONTENT_TYPE, "application/openmetrics-text; version=1.0.0; charset=utf-8")
                .body(text()),
            _ => response.status(StatusCode::NOT_FOUND).body("GET /metrics\n".to_owned()),
        }
    });
    http1::Builder::new()
        .keep_alive(false)
        .timer(TokioTimer::new())
        .serve_connection(TokioIo::new(stream), service)
        .await
}

/// The name of a status as gRPC's specification spells it.
fn grpc_name(code: Code) -> &'static str {
    match code {
        Code::Ok => "OK",
        Code::Cancelled => "CANCELLED",
        Code::Unknown => "UNKNOWN",
        Code::InvalidArgument => "INVALID_ARGUMENT",
        Code::DeadlineExceeded => "DEADLINE_EXCEEDED",
        Code::NotFound => "NOT_FOUND",
        Code::AlreadyExists => "ALREADY_EXISTS",
        Code::PermissionDenied => "PERMISSION_DENIED",
        Code::ResourceExhausted => "RESOURCE_EXHAUSTED",
        Code::FailedPrecondition => "FAILED_PRECONDITION",
        Code::Aborted => "ABORTED",
        Code::OutOfRange => "OUT_OF_RANGE",
        Code::Unimplemented => "UNIMPLEMENTED",
        Code::Internal => "INTERNAL",
        Code::Unavailable => "UNAVAILABLE",
        Code::DataLoss => "DATA_LOSS",
        Code::Unauthenticated => "UNAUTHENTICATED",
    }
}
