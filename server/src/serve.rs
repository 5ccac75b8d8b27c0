//! The server: opens a model, serves it on connections, stops in good order.

use std::convert::Infallible;
use std::future::pending;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use outrigger_experts::{Fingerprint, Model};
use outrigger_proto::v1::experts_server::{ExpertsServer, SERVICE_NAME};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::oneshot;
use tokio::task::JoinSet;
use tokio_stream::{Stream, StreamExt as _};
use tonic::service::interceptor::InterceptedService;
use tonic::transport::Server;
use tonic::transport::server::{Connected, Router, TcpIncoming};
use tonic_health::ServingStatus;
use tonic_health::pb::health_server::HealthServer;
use tonic_health::server::{HealthReporter, HealthService};

use crate::connection::{BoxError, Limits, accepted, limit};
use crate::delivery::Delivered;
use crate::engine::Engine;
use crate::metrics::Metrics;
use crate::preload;
use crate::queue::{self, Queue};
use crate::service::{Runner, Service};
use crate::shard::Shard;
use crate::stop::hangup;
use crate::tenants::{Door, Tenants};
use crate::tls::Tls;
use crate::{Compute, Error, Result, ServerConfig};

/// A peer that is silent this long is asked whether it is there ...
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(20);
/// ... and has so long to say that it is.
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(10);
/// Bytes that a peer may send ahead on a stream, and on a connection: a batch of rows fits, so that
/// it does not take several round trips.
const STREAM_WINDOW: u32 = 2 << 20;
const CONNECTION_WINDOW: u32 = 8 << 20;
/// Bytes in one frame that a peer may send: fewer frames for a batch of rows.
const FRAME_BYTES: u32 = 256 << 10;
/// Bytes of all headers of a request.
const HEADER_BYTES: u32 = 16 << 10;
/// How long a probe may stay, and its requests in flight.
const PROBE_TIMEOUT: Duration = Duration::from_secs(10);
const MAX_PROBES: u32 = 8;

/// A model, or a part of it, ready to be served.
pub struct ExpertServer {
    shard: Arc<Shard>,
    runner: Runner,
    /// Resolves when the compute thread has ended, if there is one.
    compute_ended: Option<oneshot::Receiver<()>>,
    metrics: Arc<Metrics>,
    health: HealthReporter,
    tenants: Option<Tenants>,
    limits: Limits,
    request_timeout: Duration,
    max_streams: u32,
    drain_timeout: Duration,
}

impl ExpertServer {
    /// Maps the model, and starts the threads that compute and one that reads the experts.
    ///
    /// # Errors
    /// A model file that cannot be used, a range that the model does not have, a limit of 0.
    pub fn open(config: ServerConfig) -> Result<ExpertServer> {
        let (threads, max_rows) = (config.threads, config.max_rows as usize);
        let at_least_one = [
            ("threads", threads),
            ("max_rows", max_rows),
            ("queue_rows", config.queue_rows),
            ("max_connections", config.max_connections),
            ("max_streams", config.max_streams as usize),
        ];
        if let Some((name, _)) = at_least_one.iter().find(|(_, value)| *value == 0) {
            return Err(Error::Zero(name));
        }
        let model = Arc::new(Model::open(&config.model)?);
        if model.is_pack() {
            return Err(Error::Pack(config.model));
        }
        let shard = Arc::new(Shard::new(model, &config)?);
        let metrics = Arc::new(Metrics::new());
        let engine = Engine::new(&shard, &config, metrics.clone())?;
        let (runner, compute_ended) = match config.compute {
            Compute::Inline => (Runner::Inline(Box::new(Mutex::new(engine))), None),
            Compute::Thread => {
                preload::start(&engine.store, &shard)?;
                let limits = queue::Limits {
                    rows: config.queue_rows,
                    batch_rows: max_rows,
                    wait: config.max_wait,
                };
                let (queue, ended) = Queue::start(engine, limits, metrics.clone())?;
                (Runner::Thread(queue), Some(ended))
            }
        };
        Ok(ExpertServer {
            shard,
            runner,
            compute_ended,
            metrics,
            health: HealthReporter::new(),
            limits: Limits::of(&config),
            tenants: config.tenants,
            request_timeout: config.request_timeout,
            max_streams: config.max_streams,
            drain_timeout: config.drain_timeout,
        })
    }

    /// What the server does, counted; for [`serve_metrics`](crate::serve_metrics).
    pub fn metrics(&self) -> Arc<Metrics> {
        self.metrics.clone()
    }

    /// The fingerprint of the model.
    pub fn fingerprint(&self) -> Fingerprint {
        self.shard.fingerprint
    }

    /// The model's name and the part of it that is served, in words.
    pub fn summary(&self) -> String {
        self.shard.to_string()
    }

    /// The state that `grpc.health.v1` tells; for [`serve_health`].
    pub fn health(&self) -> HealthReporter {
        self.health.clone()
    }

    /// Serves the connections that `incoming` yields until `shutdown` resolves: then health turns to
    /// NOT_SERVING, no new connection or request is taken, and what is in hand is finished, within
    /// [`ServerConfig::drain_timeout`]. After an error that `incoming` yields, it is asked again after a pause.
    ///
    /// # Errors
    /// [`Error::ComputeStopped`] after a panic, [`Error::Transport`] where the transport gives up.
    pub async fn serve<I, IO, E>(
        self,
        incoming: I,
        tls: Option<Tls>,
        shutdown: impl Future<Output = ()>,
    ) -> Result<()>
    where
        I: Stream<Item = Result<IO, E>> + Send + 'static,
        IO: AsyncRead + AsyncWrite + Connected + Unpin + Send + 'static,
        E: Into<BoxError> + Send + 'static,
    {
        let (drain_timeout, metrics) = (self.drain_timeout, self.metrics.clone());
        let incoming = limit(accepted(incoming), self.limits, metrics.clone());
        // Ends with this function.
        let mut beside = JoinSet::new();
        if let Runner::Thread(queue) = &self.runner {
            beside.spawn(queue::stay_awake(queue.alone()));
        }
        if let Some(tenants) = self.tenants.clone() {
            beside.spawn(tenants.watch(hangup()?, metrics.clone()));
        }
        if let Some(tls) = tls.clone() {
            beside.spawn(tls.watch(hangup()?, metrics.clone()));
        }
        let health = self.health.clone();
        health.set_service_status(SERVICE_NAME, ServingStatus::Serving).await;
        let (router, compute_ended) = self.router(&health)?;

        let (told, draining) = oneshot::channel();
        let shutdown = async {
            shutdown.await;
            tracing::info!("draining");
            stop_health(health).await;
            // Nobody listens where the server has ended by itself.
            let _ = told.send(());
        };
        let overdue = async {
            match draining.await {
                Ok(()) => tokio::time::sleep(drain_timeout).await,
                Err(_) => pending().await,
            }
        };
        let served = async {
            match tls {
                None => {
                    let incoming = incoming.map(Ok::<_, Infallible>);
                    router.serve_with_incoming_shutdown(incoming, shutdown).await
                }
                Some(tls) => {
                    let incoming = tls.accept(incoming, metrics).map(Ok::<_, Infallible>);
                    router.serve_with_incoming_shutdown(incoming, shutdown).await
                }
            }
        };
        tokio::select! {
            served = served => Ok(served?),
            () = overdue => {
                tracing::warn!("work was left after {drain_timeout:?}");
                Ok(())
            }
            () = compute_ended => Err(Error::ComputeStopped),
        }
    }

    /// All services with their limits, and what resolves when nothing can be computed any more.
    fn router(self, health: &HealthReporter) -> Result<(Router, impl Future<Output = ()> + use<>)> {
        let (request_bytes, reply_bytes) =
            (self.shard.max_message_bytes(), self.shard.max_reply_bytes());
        let metrics = self.metrics;
        let refusals = Arc::default();
        let door = Door { metrics: metrics.clone(), tenants: self.tenants, refusals };
        let open_door = Door { tenants: None, ..door.clone() };
        let service = Service { shard: self.shard, runner: self.runner, metrics };
        let experts = ExpertsServer::new(service)
            .max_decoding_message_size(request_bytes)
            .max_encoding_message_size(reply_bytes);
        let reflection = tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(outrigger_proto::FILE_DESCRIPTOR_SET)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
            .build_v1()
            .expect("the descriptors were made at build time");
        let health = HealthService::from_health_reporter(health.clone());

        let mut server = Server::builder()
            .timeout(self.request_timeout)
            .max_concurrent_streams(self.max_streams)
            .initial_stream_window_size(STREAM_WINDOW)
            .initial_connection_window_size(CONNECTION_WINDOW)
            .max_frame_size(FRAME_BYTES)
            .http2_max_header_list_size(HEADER_BYTES)
            .http2_keepalive_interval(Some(KEEPALIVE_INTERVAL))
            .http2_keepalive_timeout(Some(KEEPALIVE_TIMEOUT));
        let router = server
            .add_service(InterceptedService::new(Delivered(experts), door.clone()))
            // Probes have no token.
            .add_service(InterceptedService::new(HealthServer::new(health), open_door))
            .add_service(InterceptedService::new(reflection, door));

        let compute_ended = async {
            match self.compute_ended {
                Some(ended) => {
                    // Ends with an error when the sender goes, which is the news.
                    let _ = ended.await;
                }
                None => pending().await,
            }
        };
        Ok((router, compute_ended))
    }
}

/// Answers `grpc.health.v1`, and nothing else, without TLS: Kubernetes' probes know no certificates.
///
/// # Errors
/// [`Error::Transport`] where the transport gives up.
pub async fn serve_health(incoming: TcpIncoming, health: HealthReporter) -> Result<()> {
    let service = HealthServer::new(HealthService::from_health_reporter(health));
    let mut server = Server::builder()
        .max_connection_age(PROBE_TIMEOUT)
        .timeout(PROBE_TIMEOUT)
        .max_concurrent_streams(MAX_PROBES);
    let incoming = accepted(incoming).map(Ok::<_, Infallible>);
    Ok(server.add_service(service).serve_with_incoming(incoming).await?)
}

/// Tells whoever watches, and ends their streams, which would hold the connections open. That forgets the state, which whoever
/// asks from then on is to be told too.
async fn stop_health(mut health: HealthReporter) {
    for service in ["", SERVICE_NAME] {
        health.set_service_status(service, ServingStatus::NotServing).await;
        health.clear_service_status(service).await;
        health.set_service_status(service, ServingStatus::NotServing).await;
    }
}
