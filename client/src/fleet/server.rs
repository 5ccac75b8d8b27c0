//! One server: its link, its connection, and the task that tends to both.

use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use outrigger_proto::Whole;
use outrigger_proto::v1::experts_client::ExpertsClient;
use outrigger_proto::v1::{DescribeRequest, DescribeResponse};
use outrigger_router::{Link, State as LinkState};
use tokio::sync::Notify;
use tonic::service::Interceptor;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint};
use tonic::{Request, Status};

use super::error::CallError;
use super::sources::Address;
use super::{Identity, RosterEntry, ServerStatus, Shared};
use crate::config::EngineConfig;
use crate::credentials::BearerToken;
use crate::error::{Error, Result};

/// A peer that is silent for this long is asked for a sign of life, and given up after as long again.
const KEEPALIVE: Duration = Duration::from_secs(2);
/// HTTP/2 flow-control windows: a prefill batch's sums fit without a round trip for more window.
const STREAM_WINDOW: u32 = 8 << 20;
/// The largest answer that is read.
const MAX_ANSWER_BYTES: usize = 256 << 20;
/// The largest description that is read.
const MAX_DESCRIPTION_BYTES: usize = 1 << 20;

/// Which experts a server holds, by layer.
#[derive(Debug, PartialEq)]
pub(crate) struct Held(Vec<Vec<bool>>);

impl Held {
    /// Whether each expert of `layer` is held.
    pub(crate) fn layer(&self, layer: usize) -> &[bool] {
        &self.0[layer]
    }

    /// Experts, over all layers.
    fn count(&self) -> usize {
        self.0.iter().flatten().filter(|held| **held).count()
    }

    /// One layer's experts.
    #[cfg(test)]
    pub(super) fn of(layer: &[bool]) -> Held {
        Held(vec![layer.to_vec()])
    }

    fn from_description(description: &DescribeResponse, identity: &Identity) -> Held {
        let covered =
            |layer, expert| description.held.iter().any(|part| part.covers(layer, expert));
        let layer = |layer| (0..identity.experts as u32).map(|e| covered(layer, e)).collect();
        Held((0..identity.layers as u32).map(layer).collect())
    }
}

/// A connection on which every call shows the device's token.
pub(super) type Client = ExpertsClient<Whole<InterceptedService<Channel, Credentials>>>;

#[derive(Clone, Debug)]
pub(super) struct Credentials(Option<BearerToken>);

impl Interceptor for Credentials {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        if let Some(token) = &self.0 {
            request.metadata_mut().insert("authorization", token.header());
        }
        Ok(request)
    }
}

#[derive(Debug)]
pub(super) struct Server {
    pub(super) id: u16,
    url: String,
    endpoint: Endpoint,
    shared: Arc<Shared>,
    state: Mutex<State>,
    /// Wakes the tender after a failure.
    failed: Notify,
}

#[derive(Debug)]
struct State {
    link: Link,
    peer: Option<Peer>,
    fault: Option<(Duration, String)>,
}

#[derive(Clone, Debug)]
struct Peer {
    client: Client,
    held: Arc<Held>,
    /// Rows that it takes in one request.
    max_rows: usize,
}

impl Server {
    pub(super) fn new(id: u16, address: &Address, shared: Arc<Shared>) -> Result<Server> {
        let config = &shared.config;
        if config.dial.is_network() && !address.is_https() && !address.is_loopback() {
            tracing::warn!(server = %address, "what goes there can be read on the way: https:// would keep it private");
        }
        // A call may take a quarter of what a token may before it looks like a fault, however fast the link was so
        // far, and never longer than a token may.
        let link = Link::new(config.deadline / 4..=config.deadline, u64::from(id));
        Ok(Server {
            id,
            url: address.to_string(),
            endpoint: endpoint(address, &shared.tls)?,
            shared,
            state: Mutex::new(State { link, peer: None, fault: None }),
            failed: Notify::new(),
        })
    }

    /// Probes the server whenever its link is not up. Never returns.
    pub(super) async fn tend(self: Arc<Server>) {
        loop {
            let next = { self.state().link.next_probe(self.now()) };
            match next {
                None => self.failed.notified().await,
                Some(at) => {
                    tokio::time::sleep_until(self.shared.epoch + at).await;
                    self.probe().await;
                }
            }
        }
    }

    async fn probe(&self) {
        let known = self.state().peer.clone();
        let patience = Link::PROBE_DEADLINE;
        let started = self.now();
        let found = match tokio::time::timeout(patience, self.describe(known)).await {
            Ok(found) => found,
            Err(_) => Err(CallError::Timeout(patience)),
        };
        let now = self.now();
        let mut state = self.state();
        match found {
            Ok(peer) => {
                state.peer = Some(peer);
                state.link.on_probe(now, Ok(now.saturating_sub(started)));
                if state.link.state(now) == LinkState::Up {
                    tracing::info!(server = %self.url, "up");
                    self.shared.up.notify_waiters();
                }
            }
            Err(error) => {
                tracing::debug!(server = %self.url, %error, "probe failed");
                state.peer = None;
                state.link.on_probe(now, Err(error.failure()));
                state.fault = Some((now, error.to_string()));
            }
        }
    }

    /// Asks who is there, over the connection of the last good probe or a fresh one, and checks that it has this model.
    async fn describe(&self, known: Option<Peer>) -> Result<Peer, CallError> {
        let client = match known {
            Some(peer) => peer.client,
            None => self
                .connection()
                .max_decoding_message_size(MAX_ANSWER_BYTES)
                .max_encoding_message_size(MAX_ANSWER_BYTES),
        };
        let mut briefly = client.clone().max_decoding_message_size(MAX_DESCRIPTION_BYTES);
        let description = briefly.describe(DescribeRequest {}).await?.into_inner();
        let identity = &self.shared.identity;
        if description.fingerprint != identity.fingerprint.as_bytes()[..] {
            return Err(CallError::WrongModel { found: description.model });
        }
        let shape = (description.layers, description.experts, description.width);
        let expected = (identity.layers as u32, identity.experts as u32, identity.width as u32);
        if shape != expected {
            return Err(CallError::BadAnswer(format!(
                "describes (layers, experts, width) {shape:?}, expected {expected:?}"
            )));
        }
        let (parts, most) = (description.held.len(), identity.layers * identity.experts);
        if parts > most {
            let found = format!("holds {parts} parts, expected {most} experts at most");
            return Err(CallError::BadAnswer(found));
        }
        let held = Arc::new(Held::from_description(&description, identity));
        let limits = description.limits.unwrap_or_default();
        // A server that does not say takes what comes.
        let max_rows = if limits.max_rows == 0 { usize::MAX } else { limits.max_rows as usize };
        Ok(Peer { client, held, max_rows })
    }

    fn connection(&self) -> Client {
        let config = &self.shared.config;
        let channel = config.dial.dial(self.endpoint.clone());
        let credentials = Credentials(config.token.clone());
        ExpertsClient::new(Whole(InterceptedService::new(channel, credentials)))
    }

    /// The connection, if calls may go out now.
    pub(super) fn client(&self) -> Option<Client> {
        let now = self.now();
        let state = self.state();
        if state.link.may_send(now) {
            state.peer.as_ref().map(|peer| peer.client.clone())
        } else {
            None
        }
    }

    /// Rows that it takes in one request, as far as it is known.
    pub(super) fn max_rows(&self) -> Option<usize> {
        self.state().peer.as_ref().map(|peer| peer.max_rows)
    }

    pub(super) fn entry(&self) -> Option<RosterEntry> {
        let now = self.now();
        let state = self.state();
        if !state.link.may_send(now) {
            return None;
        }
        let held = state.peer.as_ref()?.held.clone();
        let (trip, per_row) = (state.link.trip(now), state.link.per_row(now));
        Some(RosterEntry { server: self.id, held, trip, per_row })
    }

    /// How long an answer about `rows` rows, counted once for each expert, may take before it counts as lost.
    pub(super) fn deadline(&self, rows: usize) -> Duration {
        let now = self.now();
        self.state().link.deadline(now, rows)
    }

    /// The smoothed round trip, without what rows add to it.
    pub(super) fn trip(&self) -> Duration {
        let now = self.now();
        self.state().link.trip(now)
    }

    pub(super) fn on_success(&self, trip: Duration, rows: usize) {
        let now = self.now();
        self.shared.metrics.answered(&self.url, trip);
        let mut state = self.state();
        state.link.on_success(now, trip, rows);
        state.fault = None;
    }

    pub(super) fn on_failure(&self, error: &CallError) {
        let now = self.now();
        tracing::debug!(server = %self.url, %error, "call failed");
        self.shared.metrics.failed(&self.url, error.kind());
        let mut state = self.state();
        state.fault = Some((now, error.to_string()));
        if matches!(error, CallError::Impatient(_)) {
            return;
        }
        state.link.on_failure(now, error.failure());
        if state.link.state(now) != LinkState::Up {
            // A half-open connection would swallow the probes too: they dial afresh.
            state.peer = None;
            self.failed.notify_one();
        }
    }

    pub(super) fn is_up(&self) -> bool {
        let now = self.now();
        self.state().link.state(now) == LinkState::Up
    }

    /// The time and text of the last fault.
    pub(super) fn last_fault(&self) -> Option<(Duration, String)> {
        let state = self.state();
        state.fault.as_ref().map(|(at, text)| (*at, format!("{}: {text}", self.url)))
    }

    pub(super) fn status(&self) -> ServerStatus {
        let now = self.now();
        let state = self.state();
        ServerStatus {
            url: self.url.clone(),
            state: state.link.state(now),
            experts: state.peer.as_ref().map_or(0, |peer| peer.held.count()),
            trip: state.link.trip(now),
            fault: state.fault.as_ref().map(|(_, text)| text.clone()),
        }
    }

    fn now(&self) -> Duration {
        self.shared.epoch.elapsed()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

/// What connections to servers are secured with; the same for all of them.
///
/// # Errors
/// A certificate authority or an identity that cannot be used.
pub(super) fn tls(config: &EngineConfig) -> Result<ClientTlsConfig> {
    let mut tls = ClientTlsConfig::new();
    if config.tls_ca.is_none() && config.tls_identity.is_none() {
        return Ok(tls.with_enabled_roots());
    }
    if let Some(path) = &config.tls_ca {
        let bad = |source| Error::TlsCa { path: path.clone(), source };
        let pem = std::fs::read(path).map_err(bad)?;
        const BEGIN: &[u8] = b"-----BEGIN CERTIFICATE-----";
        if !pem.windows(BEGIN.len()).any(|part| part == BEGIN) {
            return Err(bad(std::io::Error::other("found no certificate, expected PEM")));
        }
        tls = tls.ca_certificate(Certificate::from_pem(pem));
    }
    if let Some(identity) = &config.tls_identity {
        tls = tls.identity(identity.identity());
    }
    // An endpoint that nobody dials tells whether they are of use.
    Endpoint::from_static("https://localhost")
        .tls_config(tls.clone())
        .map_err(|source| Error::TlsIdentity { source: Box::new(source) })?;
    Ok(if config.tls_ca.is_none() { tls.with_enabled_roots() } else { tls })
}

fn endpoint(address: &Address, tls: &ClientTlsConfig) -> Result<Endpoint> {
    let uri = address.uri.uri();
    let host = uri.host().unwrap_or_default().to_owned();
    let endpoint = match address.at {
        None => Endpoint::from(uri),
        Some(at) => {
            let place = format!("{}://{at}", uri.scheme_str().unwrap_or("http"));
            Endpoint::from_shared(place).expect("an address makes a URL").origin(uri)
        }
    };
    let endpoint = endpoint
        .tcp_nodelay(true)
        .http2_keep_alive_interval(KEEPALIVE)
        .keep_alive_timeout(KEEPALIVE)
        .keep_alive_while_idle(true)
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(STREAM_WINDOW);
    if !address.is_https() {
        return Ok(endpoint);
    }
    // The certificate is the name's, wherever the name leads.
    let tls = match address.at {
        None => tls.clone(),
        Some(_) => tls.clone().domain_name(host),
    };
    let bad_url = |source| Error::ServerUrl { url: address.to_string(), source: Box::new(source) };
    endpoint.tls_config(tls).map_err(bad_url)
}
