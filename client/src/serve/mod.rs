//! Chats and completions over HTTP, as OpenAI's clients expect them; feature `serve`.
//!
//! The way of a request: `door` sees who asks, `request` understands the body, `sessions` gives it a place, `generate`
//! computes on a thread of its own, and `answer` writes what comes of it. Whatever text goes out has marks that say what
//! it was made of (`made`).

mod answer;
mod counts;
mod door;
mod error;
mod fields;
mod generate;
mod made;
mod patient;
mod reply;
mod request;
mod routes;
mod sessions;
mod stops;

use std::convert::Infallible;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio::task::JoinSet;
use tokio::time::timeout;

use self::counts::Counts;
pub use self::door::ApiKey;
use self::door::Door;
use self::patient::Patient;
use self::request::Rules;
use self::routes::Service;
use self::sessions::Sessions;
use crate::engine::Engine;
use crate::sample::SamplerConfig;

/// Connections at a time; those on top are closed at once.
const MAX_CONNECTIONS: usize = 256;
/// Time to look for another connection where the system has none to give.
const ACCEPT_PAUSE: Duration = Duration::from_secs(1);

/// How an engine is served.
#[derive(Clone, Debug)]
pub struct ServeConfig {
    /// The name of the model.
    pub model: String,
    /// How tokens are chosen where a request says nothing; its seed counts for nothing.
    pub sampler: SamplerConfig,
    /// The seed where a request says nothing; a random one for each if `None`.
    pub seed: Option<u64>,
    /// Requests that are computed at a time, each in a session of its own.
    pub parallel: usize,
    /// Requests that wait for a place; those on top are sent away.
    pub queue: usize,
    /// Names that this server is reached by, besides `localhost` and addresses.
    pub allow_hosts: Vec<String>,
    /// What callers have to show; nothing if `None`.
    pub api_key: Option<ApiKey>,
    /// How long the head of a request may take, or the next one to come, and then the body.
    pub request_timeout: Duration,
    /// How long a reader may take nothing of what is there for it.
    pub reader_timeout: Duration,
    /// How long answers in hand may take after the signal to stop.
    pub drain_timeout: Duration,
}

impl ServeConfig {
    /// The defaults, for a model of this name.
    pub fn new(model: impl Into<String>) -> ServeConfig {
        ServeConfig {
            model: model.into(),
            sampler: SamplerConfig::default(),
            seed: None,
            parallel: 1,
            queue: 16,
            allow_hosts: Vec::new(),
            api_key: None,
            request_timeout: Duration::from_secs(30),
            reader_timeout: Duration::from_secs(30),
            drain_timeout: Duration::from_secs(30),
        }
    }
}

/// Answers requests on `listener` until `shutdown` resolves: then no new one is taken, and answers in hand are
/// finished, within [`ServeConfig::drain_timeout`].
pub async fn serve(
    engine: Arc<Engine>,
    listener: TcpListener,
    config: ServeConfig,
    shutdown: impl Future<Output = ()>,
) {
    let (request_timeout, reader_timeout) = (config.request_timeout, config.reader_timeout);
    let drain_timeout = config.drain_timeout;
    let service = Arc::new(service(engine, config));
    let places = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let (stop, stopping) = watch::channel(false);
    let mut connections = JoinSet::new();
    let mut shutdown = pin!(shutdown);
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = &mut shutdown => break,
        };
        match (accepted, places.clone().try_acquire_owned()) {
            (Ok((stream, _)), Ok(place)) => {
                let connection = Connection {
                    service: service.clone(),
                    stopping: stopping.clone(),
                    request_timeout,
                    reader_timeout,
                    _place: place,
                };
                connections.spawn(connection.serve(stream));
            }
            (Ok(_), Err(_)) => tracing::warn!("a connection too many was closed"),
            (Err(error), _) => {
                tracing::warn!(%error, "cannot accept a connection");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
        while connections.try_join_next().is_some() {}
    }
    drop(listener);
    tracing::info!("draining");
    let _ = stop.send(true);
    let ended = async { while connections.join_next().await.is_some() {} };
    if timeout(drain_timeout, ended).await.is_err() {
        tracing::warn!("answers were left after {drain_timeout:?}");
    }
}

fn service(engine: Arc<Engine>, config: ServeConfig) -> Service {
    Service {
        sessions: Sessions::new(engine.clone(), config.parallel, config.queue),
        door: Door { allow_hosts: config.allow_hosts, api_key: config.api_key },
        rules: Rules {
            model: config.model,
            context: engine.context(),
            vocab: engine.spec().n_vocab,
            sampler: config.sampler,
            seed: config.seed,
        },
        body_timeout: config.request_timeout,
        counts: Counts::new(),
        started: answer::now(),
        engine,
    }
}

/// One connection, with what it needs.
struct Connection {
    service: Arc<Service>,
    stopping: watch::Receiver<bool>,
    request_timeout: Duration,
    reader_timeout: Duration,
    _place: OwnedSemaphorePermit,
}

impl Connection {
    async fn serve(mut self, stream: TcpStream) {
        // Tokens go out one by one.
        let _ = stream.set_nodelay(true);
        let stream = TokioIo::new(Patient::new(stream, self.reader_timeout));
        let answer = service_fn(|request| {
            let service = self.service.clone();
            async move { Ok::<_, Infallible>(service.answer(request).await) }
        });
        let mut connection = pin!(
            http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(self.request_timeout)
                .serve_connection(stream, answer)
        );
        let stopping = async {
            let _ = self.stopping.wait_for(|stop| *stop).await;
        };
        let served = tokio::select! {
            served = &mut connection => served,
            () = stopping => {
                connection.as_mut().graceful_shutdown();
                connection.await
            }
        };
        if let Err(error) = served {
            tracing::debug!(%error, "a connection ended early");
        }
    }
}
