//! One simulated device: a connection, random routings, and what became of them.

use std::error::Error as _;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use bytes::Bytes;
use outrigger_experts::{ActFormat, Activations};
use outrigger_proto::encoding::{encode_f16, encode_f32, encode_q8_0, encode_q8_k};
use outrigger_proto::v1::experts_client::ExpertsClient;
use outrigger_proto::v1::{DescribeResponse, Encoding, ForwardRequest, Group, Held};
use outrigger_proto::{Whole, pushback};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore as _, SeedableRng as _};
use tokio::time::{Instant, sleep_until, timeout_at};
use tonic::metadata::AsciiMetadataValue;
use tonic::service::Interceptor;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity};
use tonic::{Request, Status};

use super::Peer;
use crate::cli::read;

/// A device whose call failed waits so long before the next.
const AFTER_ERROR: Duration = Duration::from_millis(100);
/// How long a connection may take to open.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// How devices reach the server.
pub(super) struct Dial {
    endpoint: Endpoint,
    credentials: Credentials,
}

pub(super) type Client = ExpertsClient<Whole<InterceptedService<Channel, Credentials>>>;

/// The bearer token, if there is one.
#[derive(Clone)]
pub(super) struct Credentials(Option<AsciiMetadataValue>);

impl Credentials {
    fn read(path: Option<&Path>) -> anyhow::Result<Credentials> {
        let Some(path) = path else { return Ok(Credentials(None)) };
        let token = String::from_utf8(read(path)?).ok();
        let value = token.and_then(|token| format!("Bearer {}", token.trim()).parse().ok());
        let mut value: AsciiMetadataValue =
            value.with_context(|| format!("{}: found no token", path.display()))?;
        value.set_sensitive(true);
        Ok(Credentials(Some(value)))
    }
}

impl Interceptor for Credentials {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        if let Some(token) = &self.0 {
            request.metadata_mut().insert("authorization", token.clone());
        }
        Ok(request)
    }
}

impl Dial {
    pub(super) fn new(peer: &Peer) -> anyhow::Result<Dial> {
        let credentials = Credentials::read(peer.token_file.as_deref())?;
        let server = &peer.server;
        let url = if server.contains("://") { server.clone() } else { format!("http://{server}") };
        let https = url.starts_with("https:");
        let endpoint = Endpoint::from_shared(url)
            .with_context(|| format!("--server {server} is no address"))?
            .connect_timeout(CONNECT_TIMEOUT)
            .tcp_nodelay(true);
        if !https {
            return Ok(Dial { endpoint, credentials });
        }
        let mut tls = match &peer.tls_ca {
            Some(path) => ClientTlsConfig::new().ca_certificate(Certificate::from_pem(read(path)?)),
            None => ClientTlsConfig::new().with_enabled_roots(),
        };
        if let (Some(cert), Some(key)) = (&peer.tls_cert, &peer.tls_key) {
            tls = tls.identity(Identity::from_pem(read(cert)?, read(key)?));
        }
        Ok(Dial { endpoint: endpoint.tls_config(tls)?, credentials })
    }

    pub(super) async fn connect(&self) -> anyhow::Result<Client> {
        let channel = self.endpoint.connect().await?;
        Ok(ExpertsClient::new(Whole(InterceptedService::new(channel, self.credentials.clone()))))
    }
}

/// What there is to ask for.
#[derive(Clone)]
pub(super) struct Work {
    fingerprint: Bytes,
    encoding: Encoding,
    /// One row.
    activations: Bytes,
    /// The experts held of each layer that has any, by ascending layer.
    layers: Arc<Vec<(u32, Vec<u32>)>>,
    top_k: usize,
}

impl Work {
    /// # Errors
    /// A server that holds nothing, or fewer than `top_k` experts of a layer, or takes no encoding that is known here.
    pub(super) fn of(server: &DescribeResponse, top_k: u16, seed: u64) -> anyhow::Result<Work> {
        let layers: Vec<_> = (0..server.layers)
            .map(|layer| (layer, held(&server.held, layer, server.experts)))
            .filter(|(_, experts)| !experts.is_empty())
            .collect();
        ensure!(!layers.is_empty(), "the server holds no experts");
        let fewest = layers.iter().map(|(_, experts)| experts.len()).min().unwrap_or(0);
        ensure!(
            usize::from(top_k) <= fewest,
            "-k {top_k}: expected at most {fewest}, the experts of a layer that the server holds"
        );
        let encoding = server.up().next().context("the server takes no encoding")?;
        let mut random = ChaCha8Rng::seed_from_u64(seed);
        let row: Vec<f32> =
            (0..server.width).map(|_| random.next_u32() as f32 / u32::MAX as f32 - 0.5).collect();
        Ok(Work {
            fingerprint: server.fingerprint.clone(),
            encoding,
            activations: encode(&row, encoding)?,
            layers: Arc::new(layers),
            top_k: top_k.into(),
        })
    }

    /// One row of a layer, to as many of `experts` as a row is routed to.
    fn request(&self, layer: u32, experts: &[u32], random: &mut ChaCha8Rng) -> ForwardRequest {
        let mut experts = experts.to_vec();
        for k in 0..self.top_k {
            let other = k + random.next_u32() as usize % (experts.len() - k);
            experts.swap(k, other);
        }
        experts.truncate(self.top_k);
        experts.sort_unstable();
        let weight = 1.0 / self.top_k as f32;
        let group = |expert| Group { expert, rows: vec![0], weights: vec![weight] };
        ForwardRequest {
            request_id: random.next_u64(),
            fingerprint: self.fingerprint.clone(),
            layer,
            rows: 1,
            encoding: self.encoding.into(),
            activations: self.activations.clone(),
            groups: experts.into_iter().map(group).collect(),
            reply: Encoding::F48.into(),
        }
    }
}

/// The experts of a layer that any block covers, ascending.
fn held(blocks: &[Held], layer: u32, experts: u32) -> Vec<u32> {
    let held = |expert: &u32| blocks.iter().any(|block| block.covers(layer, *expert));
    (0..experts).filter(held).collect()
}

fn encode(row: &[f32], encoding: Encoding) -> anyhow::Result<Bytes> {
    let mut x = Activations::new(row.len());
    x.set(row);
    Ok(match encoding {
        Encoding::Q80 => {
            x.quantize(ActFormat::Q8_0);
            encode_q8_0(x.q8_0().0, x.q8_0().1)
        }
        Encoding::Q8K => {
            x.quantize(ActFormat::Q8_K);
            encode_q8_k(x.q8_k().0, x.q8_k().1)
        }
        Encoding::F32 => encode_f32(row),
        Encoding::F16 => encode_f16(row).context("small numbers fit")?,
        other => anyhow::bail!("the server wants activations as {}", other.as_str_name()),
    })
}

/// What became of calls.
#[derive(Default)]
pub(super) struct Tally {
    /// Rows times experts that were run.
    pub(super) rows: u64,
    /// Of each call that was answered.
    pub(super) latencies: Vec<Duration>,
    pub(super) shed: u64,
    pub(super) errors: u64,
    pub(super) last_error: Option<String>,
}

impl Tally {
    pub(super) fn add(&mut self, other: Tally) {
        self.rows += other.rows;
        self.latencies.extend(other.latencies);
        self.shed += other.shed;
        self.errors += other.errors;
        self.last_error = other.last_error.or(self.last_error.take());
    }
}

/// One device.
pub(super) struct Device {
    client: Client,
    work: Work,
    random: ChaCha8Rng,
}

impl Device {
    pub(super) fn new(client: Client, work: Work, seed: u64, number: u32) -> Device {
        let mut random = ChaCha8Rng::seed_from_u64(seed);
        random.set_stream(u64::from(number) + 1);
        Device { client, work, random }
    }

    /// Asks for one layer after another until `until`; counts what ends after `from`.
    pub(super) async fn run(mut self, from: Instant, until: Instant) -> Tally {
        let mut tally = Tally::default();
        let layers = self.work.layers.clone();
        for (layer, experts) in layers.iter().cycle() {
            let request = self.work.request(*layer, experts, &mut self.random);
            let (rows, started) = (request.groups.len() as u64, Instant::now());
            let Ok(answer) = timeout_at(until, self.client.forward(request)).await else { break };
            let now = Instant::now();
            let mut ended = Tally::default();
            let pause = match answer {
                Ok(answer) => {
                    let not_run = answer.get_ref().not_run.len() as u64;
                    ended.rows = rows.saturating_sub(not_run);
                    if not_run > 0 {
                        ended.errors = 1;
                        ended.last_error = Some(format!("{not_run} of {rows} experts not run"));
                    }
                    ended.latencies.push(now - started);
                    Duration::ZERO
                }
                Err(status) => ended.fail(&status),
            };
            if now >= from {
                tally.add(ended);
            }
            if !pause.is_zero() {
                sleep_until(until.min(now + pause)).await;
            }
        }
        tally
    }
}

impl Tally {
    /// Counts a call that was not answered; how long to wait before the next.
    fn fail(&mut self, status: &Status) -> Duration {
        match pushback(status) {
            Some(pause) => {
                self.shed += 1;
                pause
            }
            None => {
                self.errors += 1;
                self.last_error = Some(words(status));
                AFTER_ERROR
            }
        }
    }
}

/// A status with its causes. Its own `Display` has them as debug text.
pub(super) fn words(status: &Status) -> String {
    let mut words = format!("{}: {}", status.code(), status.message());
    let mut cause = status.source();
    while let Some(error) = cause {
        words += &format!(": {error}");
        cause = error.source();
    }
    words
}
