//! `outrigger-server serve`: opens a model and serves it until it is told to stop.

use std::io::Write;
use std::net::SocketAddr;
use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context as _;
use clap::Args;
use outrigger_experts::Budget;
use outrigger_server::{
    ExpertServer, ServerConfig, Tenants, Tls, bind, check_exposure, outlive_hangup, serve_health,
    serve_metrics, stop_signal,
};
use tokio::net::TcpListener;

use super::LogForm;

/// Serve experts of a model
#[derive(Debug, Args)]
pub(crate) struct Serve {
    /// The model: a GGUF file, or the first of its shards
    #[arg(short, long, value_name = "FILE", env = "OUTRIGGER_MODEL")]
    model: PathBuf,
    /// Where to listen; port 0 takes any free one
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:7070", env = "OUTRIGGER_LISTEN")]
    listen: SocketAddr,
    /// Serve only these layers
    #[arg(long, value_name = "A-B", value_parser = parse_range)]
    layers: Option<RangeInclusive<u32>>,
    /// Serve only these experts of each layer
    #[arg(long, value_name = "A-B", value_parser = parse_range)]
    experts: Option<RangeInclusive<u32>>,
    /// Threads that compute [default: one a core]
    #[arg(short, long, value_name = "N", env = "OUTRIGGER_THREADS",
          value_parser = clap::value_parser!(u16).range(1..))]
    threads: Option<u16>,
    /// Memory for experts, as 2GiB or 40%; others are read from the file when needed
    #[arg(long, value_name = "SIZE|PCT", default_value = "100%", env = "OUTRIGGER_EXPERT_CACHE")]
    expert_cache: Budget,
    /// The certificate chain (PEM) to serve TLS with; it, the key and the authority are read again when they change
    #[arg(long, value_name = "FILE", env = "OUTRIGGER_TLS_CERT", requires = "tls_key")]
    tls_cert: Option<PathBuf>,
    /// The private key (PEM) of the certificate
    #[arg(long, value_name = "FILE", env = "OUTRIGGER_TLS_KEY", requires = "tls_cert")]
    tls_key: Option<PathBuf>,
    /// Admit only devices with a certificate of this authority (PEM)
    #[arg(long, value_name = "FILE", env = "OUTRIGGER_TLS_CLIENT_CA", requires = "tls_cert")]
    tls_client_ca: Option<PathBuf>,
    /// Admit only those with a bearer token of this file: lines of NAME TOKEN [ROWS A SECOND],
    /// read again as it changes
    #[arg(long, value_name = "FILE", env = "OUTRIGGER_TOKENS")]
    token_file: Option<PathBuf>,
    /// Listen beyond this machine without TLS: anyone on the way can read the activations
    #[arg(long)]
    insecure: bool,
    /// Rows that one request may have
    #[arg(long, value_name = "N", default_value = "512",
          value_parser = clap::value_parser!(u32).range(1..=65536))]
    max_rows: u32,
    /// Rows that may wait to be computed; requests on top are sent away
    #[arg(long, value_name = "N", default_value = "4096",
          value_parser = clap::value_parser!(u32).range(1..))]
    queue_rows: u32,
    /// Milliseconds that a request may wait to be computed; what would wait longer is sent away
    #[arg(long, value_name = "MS", default_value = "200",
          value_parser = clap::value_parser!(u64).range(1..=60_000))]
    max_wait: u64,
    /// Connections at a time; those on top are closed at once
    #[arg(long, value_name = "N", default_value = "4096",
          value_parser = clap::value_parser!(u32).range(1..))]
    max_connections: u32,
    /// Requests in flight on a connection
    #[arg(long, value_name = "N", default_value = "32",
          value_parser = clap::value_parser!(u32).range(1..))]
    max_streams: u32,
    /// Seconds after which a connection without a request is closed
    #[arg(long, value_name = "S", default_value = "600",
          value_parser = clap::value_parser!(u64).range(60..=86400))]
    idle_timeout: u64,
    /// Where Prometheus finds /metrics; nowhere if absent
    #[arg(long, value_name = "ADDR", env = "OUTRIGGER_METRICS")]
    metrics: Option<SocketAddr>,
    /// Where grpc.health.v1 answers without TLS, for probes that know none; nowhere else if absent
    #[arg(long, value_name = "ADDR", env = "OUTRIGGER_HEALTH")]
    health: Option<SocketAddr>,
    /// How logs, and the line that says where it listens, are written
    #[arg(long, value_name = "FORM", default_value = "text")]
    pub(super) log: LogForm,
}

impl Serve {
    pub(crate) async fn run(self) -> anyhow::Result<()> {
        let tls = self.tls()?;
        check_exposure(self.listen, tls.is_some(), self.insecure)?;
        // Before the model, so that a signal while it opens is not lost, or does not end the server.
        let stop = stop_signal()?;
        outlive_hangup()?;
        let (listen, log) = (self.listen, self.log);
        let (metrics, health) = (self.metrics, self.health);
        let server = ExpertServer::open(self.config()?)?;
        let incoming = bind(listen).await?;
        let address = incoming.local_addr().context("cannot tell the address")?;
        if tls.is_none() && !address.ip().is_loopback() {
            tracing::warn!("{address} is open to other machines without TLS, as --insecure says");
        }
        if let Some(at) = metrics {
            publish(at, &server).await?;
        }
        if let Some(at) = health {
            let incoming = bind(at).await?;
            let address = incoming.local_addr().context("cannot tell the address")?;
            tracing::info!("health on {address}");
            tokio::spawn(serve_health(incoming, server.health()));
        }
        announce(address, &server, log)?;
        server.serve(incoming, tls, stop).await?;
        tracing::info!("stopped");
        Ok(())
    }

    fn tls(&self) -> outrigger_server::Result<Option<Tls>> {
        let (Some(cert), Some(key)) = (&self.tls_cert, &self.tls_key) else { return Ok(None) };
        Ok(Some(Tls::read(cert, key, self.tls_client_ca.as_deref())?))
    }

    fn config(self) -> outrigger_server::Result<ServerConfig> {
        let defaults = ServerConfig::default();
        let tenants = self.token_file.as_deref().map(Tenants::read).transpose()?;
        Ok(ServerConfig {
            model: self.model,
            layers: self.layers,
            experts: self.experts,
            threads: self.threads.map_or(defaults.threads, usize::from),
            expert_cache: self.expert_cache,
            max_rows: self.max_rows,
            queue_rows: self.queue_rows as usize,
            max_wait: Duration::from_millis(self.max_wait),
            max_connections: self.max_connections as usize,
            idle_timeout: Duration::from_secs(self.idle_timeout),
            max_streams: self.max_streams,
            tenants,
            ..defaults
        })
    }
}

/// Lets Prometheus see the server.
async fn publish(at: SocketAddr, server: &ExpertServer) -> anyhow::Result<()> {
    let listener = TcpListener::bind(at)
        .await
        .with_context(|| format!("cannot listen on {at} for /metrics"))?;
    let address = listener.local_addr().context("cannot tell the address")?;
    tracing::info!("metrics on http://{address}/metrics");
    let metrics = server.metrics();
    tokio::spawn(serve_metrics(listener, move || metrics.text()));
    Ok(())
}

/// One line on standard output once connections are accepted, for people and for scripts.
fn announce(address: SocketAddr, server: &ExpertServer, form: LogForm) -> std::io::Result<()> {
    let (summary, fingerprint) = (server.summary(), server.fingerprint().to_string());
    tracing::info!(fingerprint, "serving {summary}");
    let line = match form {
        LogForm::Text => format!("listening on {address}"),
        LogForm::Json => serde_json::json!({
            "listening": address.to_string(), "serving": summary, "fingerprint": fingerprint,
        })
        .to_string(),
    };
    writeln!(std::io::stdout(), "{line}")
}

/// `3` or `0-7`, both ends included.
fn parse_range(text: &str) -> Result<RangeInclusive<u32>, String> {
    let (first, last) = text.split_once('-').unwrap_or((text, text));
    let number = |text: &str| text.trim().parse().map_err(|_| "expected A-B, as 0-7".to_owned());
    Ok(number(first)?..=number(last)?)
}
