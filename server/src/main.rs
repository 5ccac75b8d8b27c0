//! `outrigger-server`: serves a model's experts to devices.

use std::fs;
use std::io::Write;
use std::net::SocketAddr;
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::thread::available_parallelism;

use anyhow::Context;
use clap::Parser;
use outrigger_experts::Budget;
use outrigger_server::{ExpertServer, ServerConfig, bind, check_exposure};
use tokio::signal::unix::{SignalKind, signal};
use tonic::transport::{Identity, ServerTlsConfig};
use tracing_subscriber::EnvFilter;

/// Runs experts of a model for devices that hold only some of them.
#[derive(Parser)]
#[command(version)]
struct Args {
    /// The model: a GGUF file, or the first of its shards
    #[arg(short, long, value_name = "FILE")]
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
    #[arg(short, long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    threads: Option<u16>,
    /// Memory for experts, as 2GiB or 40%; others are read from the file when needed
    #[arg(long, value_name = "SIZE|PCT", default_value = "100%")]
    expert_cache: Budget,
    /// The certificate chain (PEM) to serve TLS with
    #[arg(long, value_name = "FILE", requires = "tls_key")]
    tls_cert: Option<PathBuf>,
    /// The private key (PEM) of the certificate
    #[arg(long, value_name = "FILE", requires = "tls_cert")]
    tls_key: Option<PathBuf>,
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
    /// Write logs, and the line that says where it listens, as JSON
    #[arg(long)]
    json: bool,
}

fn main() -> ExitCode {
    let args = Args::parse();
    start_logs(args.json);
    match serve(args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("outrigger-server: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn serve(args: Args) -> anyhow::Result<()> {
    // The threads that compute are the server's own; these only do IO.
    let io_threads = available_parallelism().map_or(2, |n| n.get().clamp(2, 4));
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(io_threads)
        .enable_all()
        .build()
        .context("cannot start the IO threads")?
        .block_on(run(args))
}

async fn run(args: Args) -> anyhow::Result<()> {
    check_exposure(args.listen, args.tls_cert.is_some(), args.insecure)?;
    let tls = match (&args.tls_cert, &args.tls_key) {
        (Some(cert), Some(key)) => {
            let identity = Identity::from_pem(read(cert)?, read(key)?);
            Some(ServerTlsConfig::new().identity(identity))
        }
        _ => None,
    };
    // Before the model, so that a signal while it opens is not lost.
    let stop = stop_signal()?;
    let defaults = ServerConfig::default();
    let server = ExpertServer::open(ServerConfig {
        model: args.model,
        layers: args.layers,
        experts: args.experts,
        threads: args.threads.map_or(defaults.threads, usize::from),
        expert_cache: args.expert_cache,
        max_rows: args.max_rows,
        queue_rows: args.queue_rows as usize,
        ..defaults
    })?;
    let incoming = bind(args.listen).await?;
    let address = incoming.local_addr().context("cannot tell the address")?;
    if tls.is_none() && !address.ip().is_loopback() {
        tracing::warn!("{address} is open to other machines without TLS, as --insecure says");
    }
    announce(address, &server, args.json)?;
    server.serve(incoming, tls, stop).await?;
    tracing::info!("stopped");
    Ok(())
}

/// One line on standard output once connections are accepted, for people and for scripts.
fn announce(address: SocketAddr, server: &ExpertServer, json: bool) -> std::io::Result<()> {
    let (summary, fingerprint) = (server.summary(), server.fingerprint().to_string());
    tracing::info!(fingerprint, "serving {summary}");
    let line = if json {
        serde_json::json!({
            "listening": address.to_string(), "serving": summary, "fingerprint": fingerprint,
        })
        .to_string()
    } else {
        format!("listening on {address}")
    };
    writeln!(std::io::stdout(), "{line}")
}

fn start_logs(json: bool) {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    let logs = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    match json {
        true => logs.json().init(),
        false => logs.with_target(false).init(),
    }
}

/// Resolves at SIGTERM or SIGINT.
fn stop_signal() -> anyhow::Result<impl Future<Output = ()>> {
    let mut terminate = signal(SignalKind::terminate()).context("cannot listen for SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("cannot listen for SIGINT")?;
    Ok(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
    })
}

fn read(path: &Path) -> anyhow::Result<Vec<u8>> {
    fs::read(path).with_context(|| format!("cannot read {}", path.display()))
}

/// `3` or `0-7`, both ends included.
fn parse_range(text: &str) -> Result<RangeInclusive<u32>, String> {
    let (first, last) = text.split_once('-').unwrap_or((text, text));
    let number = |text: &str| text.trim().parse().map_err(|_| "expected A-B, as 0-7".to_owned());
    Ok(number(first)?..=number(last)?)
}
