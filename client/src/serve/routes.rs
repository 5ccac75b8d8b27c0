//! One request, from its head to its response.

use std::future::poll_fn;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use hyper::body::{Body as _, Incoming};
use hyper::header::HeaderValue;
use hyper::{Method, Request, Response, StatusCode};
use serde_json::{Value, json};
use tokio::runtime::Handle;
use tokio::sync::mpsc;
use tokio::task::spawn_blocking;
use tokio::time::{Instant, timeout};

use super::answer::Answer;
use super::counts::Counts;
use super::door::Door;
use super::error::ApiError;
use super::generate::{Event, Job};
use super::reply::Reply;
use super::request::{self, Endpoint, Rules, unknown_model};
use super::sessions::Sessions;
use crate::engine::Engine;

/// Bytes of a body, and as many more for each position of the context: a token of text is 4 on average.
const BODY_BYTES: usize = 64 << 10;
const TOKEN_BYTES: usize = 32;
/// Events that a reader may be behind: then the generation waits for it.
const EVENTS: usize = 32;
/// What each model has a page below.
const MODELS: &str = "/v1/models/";

/// What all requests share.
pub(super) struct Service {
    pub(super) engine: Arc<Engine>,
    pub(super) sessions: Arc<Sessions>,
    pub(super) door: Door,
    pub(super) rules: Rules,
    /// How long a body may take to come.
    pub(super) body_timeout: Duration,
    pub(super) counts: Counts,
    pub(super) started: u64,
}

impl Service {
    pub(super) async fn answer(&self, request: Request<Incoming>) -> Response<Reply> {
        let begun = Instant::now();
        let (method, path) = (request.method().clone(), request.uri().path().to_owned());
        let response = self.route(request).await.unwrap_or_else(|error| {
            tracing::debug!(?error, "refused");
            error.response()
        });
        self.counts.answer(&path, response.status(), begun.elapsed());
        tracing::info!(%method, path, status = response.status().as_u16());
        response
    }

    async fn route(&self, request: Request<Incoming>) -> Result<Response<Reply>, ApiError> {
        const METRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";
        let path = request.uri().path();
        self.door.admit(request.headers(), path == "/health")?;
        let (expected, endpoint) = match path {
            "/v1/chat/completions" => (Method::POST, Some(Endpoint::Chat)),
            "/v1/completions" => (Method::POST, Some(Endpoint::Completions)),
            "/health" | "/metrics" | "/v1/models" => (Method::GET, None),
            _ if path.starts_with(MODELS) => (Method::GET, None),
            _ => return Err(nothing_at(path)),
        };
        // Whoever looks whether there is something gets the head of the answer.
        let asked = match *request.method() == Method::HEAD {
            true => &Method::GET,
            false => request.method(),
        };
        let ok = |value: &Value| Ok(Reply::json(StatusCode::OK, value));
        match (endpoint, path) {
            _ if *asked != expected => Err(wrong_method(asked, expected)),
            (Some(endpoint), _) => self.complete(endpoint, request.into_body()).await,
            (None, "/health") => ok(&json!({ "status": "ok" })),
            (None, "/metrics") => {
                let text = self.counts.text(&self.engine.metrics());
                Ok(Reply::text(StatusCode::OK, METRICS, text))
            }
            (None, "/v1/models") => ok(&json!({ "object": "list", "data": [self.model()] })),
            (None, path) => match path.strip_prefix(MODELS) {
                Some(name) if name == self.rules.model => ok(&self.model()),
                name => Err(unknown_model(name.unwrap_or_default(), &self.rules.model)),
            },
        }
    }

    fn model(&self) -> Value {
        json!({
            "id": self.rules.model, "object": "model", "created": self.started,
            "owned_by": "outrigger",
        })
    }

    async fn complete(
        &self,
        endpoint: Endpoint,
        body: Incoming,
    ) -> Result<Response<Reply>, ApiError> {
        let body = timeout(self.body_timeout, self.read(body)).await.map_err(|_| slow_body())??;
        let request = request::Request::parse(endpoint, &body, &self.rules)?;
        drop(body);
        let place = self.sessions.place().await?;

        let stream = request.stream;
        let answer = Answer::new(
            endpoint,
            self.rules.model.clone(),
            self.engine.fingerprint().to_string(),
            request.include_usage,
        );
        let (events, mut told) = mpsc::channel(EVENTS);
        let job = Job { request, sessions: self.sessions.clone(), events };
        let runtime = Handle::current();
        // Computing keeps a thread busy: not one of those that do IO.
        spawn_blocking(move || runtime.block_on(job.run(place)));

        // What fails before the first token still has a status of its own.
        let first = match told.recv().await.unwrap_or(Event::Failed(ApiError::internal())) {
            Event::Failed(error) => return Err(error),
            first => first,
        };
        if stream {
            return Ok(Reply::events(first, told, answer));
        }
        let mut events = vec![first];
        while let Some(event) = told.recv().await {
            events.push(event);
        }
        let (whole, exact) = answer.whole(events)?;
        let mut response = Reply::json(StatusCode::OK, &whole);
        let exact = HeaderValue::from_static(if exact { "true" } else { "false" });
        response.headers_mut().insert("outrigger-exact", exact);
        Ok(response)
    }

    /// All of a body.
    async fn read(&self, mut body: Incoming) -> Result<Vec<u8>, ApiError> {
        let most = BODY_BYTES + TOKEN_BYTES * self.rules.context;
        if body.size_hint().lower() > most as u64 {
            return Err(too_large(most));
        }
        let mut bytes = Vec::new();
        while let Some(frame) = poll_fn(|cx| Pin::new(&mut body).poll_frame(cx)).await {
            let cut = |error| {
                let message = format!("body: found an end too early ({error}), expected all of it");
                ApiError::new(StatusCode::BAD_REQUEST, "invalid_body", message)
            };
            let data = frame.map_err(cut)?.into_data().unwrap_or_default();
            if bytes.len() + data.len() > most {
                return Err(too_large(most));
            }
            bytes.extend_from_slice(&data);
        }
        Ok(bytes)
    }
}

fn too_large(most: usize) -> ApiError {
    let message = format!("body: found more than {most} bytes, expected at most so many");
    ApiError::new(StatusCode::PAYLOAD_TOO_LARGE, "body_too_large", message)
}

fn slow_body() -> ApiError {
    let message = "body: found no end of it in time, expected one";
    ApiError::new(StatusCode::REQUEST_TIMEOUT, "slow_body", message)
}

fn wrong_method(found: &Method, expected: Method) -> ApiError {
    let message = format!("method: found {found}, expected {expected}");
    ApiError::new(StatusCode::METHOD_NOT_ALLOWED, "method_not_allowed", message)
}

fn nothing_at(path: &str) -> ApiError {
    let expected = "/v1/chat/completions, /v1/completions, /v1/models, /health or /metrics";
    ApiError::field("path", path, expected).with(StatusCode::NOT_FOUND, "not_found")
}
