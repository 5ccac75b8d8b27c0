//! `outrigger-server load`: devices that decode, simulated, and how the server bears them.

mod device;

use std::fmt::{self, Display};
use std::io::{self, Write as _};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, anyhow, bail};
use clap::Args;
use outrigger_experts::Budget;
use outrigger_proto::v1::DescribeRequest;
use serde::Serialize;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio::time::Instant;

use device::{Device, Dial, Tally, Work, words};

/// Load a server like devices that decode, and measure it
///
/// Each device has a connection of its own, and asks for the experts of one row in one layer after another: a random
/// choice among those that the server holds. It asks again as soon as it is answered; one that is sent away comes back
/// when it is told to.
#[derive(Debug, Args)]
pub(crate) struct Load {
    #[command(flatten)]
    peer: Peer,
    /// Devices at a time; one step for each number
    #[arg(long, value_name = "N,N", value_delimiter = ',', default_value = "1,8,32,128",
          value_parser = clap::value_parser!(u32).range(1..=65536))]
    devices: Vec<u32>,
    /// How long each step is measured
    #[arg(long, value_name = "S", default_value = "10", value_parser = clap::value_parser!(u64).range(1..))]
    seconds: u64,
    /// How long each step runs before it is measured
    #[arg(long, value_name = "S", default_value = "1")]
    warm_up: u64,
    /// Experts that a row is routed to in each layer
    #[arg(short = 'k', long, value_name = "N", default_value = "8", value_parser = clap::value_parser!(u16).range(1..))]
    top_k: u16,
    /// Where the server's `--metrics` listens, to tell its memory after each step
    #[arg(long, value_name = "ADDR")]
    metrics: Option<SocketAddr>,
    /// Seed of what is asked for
    #[arg(short, long, value_name = "N", default_value = "0")]
    seed: u64,
    /// A JSON object a step
    #[arg(long)]
    json: bool,
}

/// The server, and how devices prove who they are.
#[derive(Debug, Args)]
struct Peer {
    /// The server, host:port or http(s)://host:port
    #[arg(long, value_name = "URL")]
    server: String,
    /// Certificate authority (PEM) for an https server [default: the system's]
    #[arg(long, value_name = "FILE")]
    tls_ca: Option<PathBuf>,
    /// The certificate chain (PEM) that devices show to an https server
    #[arg(long, value_name = "FILE", requires = "tls_key")]
    tls_cert: Option<PathBuf>,
    /// The private key (PEM) of the certificate
    #[arg(long, value_name = "FILE", requires = "tls_cert")]
    tls_key: Option<PathBuf>,
    /// File with the bearer token to show
    #[arg(long, value_name = "FILE")]
    token_file: Option<PathBuf>,
}

/// What one step came to.
#[derive(Debug, Serialize)]
struct Step {
    devices: u32,
    /// Rows times experts that were run, a second.
    rows_per_s: f64,
    /// Of the calls that were answered.
    p50_ms: f64,
    p99_ms: f64,
    /// Calls that were sent away with a time to return.
    shed: u64,
    /// Calls that failed otherwise, or were answered without some of their experts.
    errors: u64,
    /// Bytes that the server's process has in memory after the step, the model's pages included.
    #[serde(skip_serializing_if = "Option::is_none")]
    server_memory: Option<u64>,
}

impl Load {
    pub(crate) async fn run(self) -> anyhow::Result<()> {
        let dial = Dial::new(&self.peer)?;
        let server = &self.peer.server;
        let no_answer = || format!("{server} does not answer");
        let mut client = dial.connect().await.with_context(no_answer)?;
        let described = client.describe(DescribeRequest {}).await;
        let described =
            described.map_err(|status| anyhow!(words(&status))).with_context(no_answer)?;
        let work = Work::of(described.get_ref(), self.top_k, self.seed)?;
        if !self.json
            && !line("devices       rows/s    p50 ms    p99 ms      shed    errors    memory")?
        {
            return Ok(());
        }
        let mut unanswered = None;
        for &devices in &self.devices {
            let mut step = self.step(&dial, &work, devices).await?;
            if step.rows_per_s == 0.0 {
                unanswered = Some(devices);
            }
            step.server_memory = match self.metrics {
                Some(at) => Some(server_memory(at).await?),
                None => None,
            };
            let text = if self.json { serde_json::to_string(&step)? } else { step.to_string() };
            if !line(text)? {
                return Ok(());
            }
        }
        match unanswered {
            Some(devices) => bail!("{server}: no call was answered with {devices} devices"),
            None => Ok(()),
        }
    }

    async fn step(&self, dial: &Dial, work: &Work, devices: u32) -> anyhow::Result<Step> {
        // Connections first, so that no device waits in a queue for others to connect.
        let mut ready = Vec::new();
        for number in 0..devices {
            let client = dial.connect().await.with_context(|| {
                format!("device {} of {devices} cannot connect to {}", number + 1, self.peer.server)
            })?;
            ready.push(Device::new(client, work.clone(), self.seed, number));
        }
        let from = Instant::now() + Duration::from_secs(self.warm_up);
        let until = from + Duration::from_secs(self.seconds);
        let mut running = JoinSet::new();
        for device in ready {
            running.spawn(device.run(from, until));
        }
        let mut all = Tally::default();
        while let Some(tally) = running.join_next().await {
            all.add(tally.context("a device panicked")?);
        }
        if let Some(error) = &all.last_error {
            tracing::warn!("{devices} devices: {} calls failed, as with: {error}", all.errors);
        }
        Ok(all.step(devices, self.seconds))
    }
}

impl Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Step { devices, rows_per_s, p50_ms, p99_ms, shed, errors, server_memory } = self;
        let memory = server_memory.map_or("-".to_owned(), |n| Budget::Bytes(n).to_string());
        write!(f, "{devices:>7} {rows_per_s:>12.1} {p50_ms:>9.2} {p99_ms:>9.2}")?;
        write!(f, " {shed:>9} {errors:>9} {memory:>9}")
    }
}

/// Prints a line; whether anybody reads it: `outrigger-server load ... | head`.
fn line(text: impl Display) -> anyhow::Result<bool> {
    match writeln!(io::stdout(), "{text}") {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(false),
        written => written.map(|()| true).context("cannot write to standard output"),
    }
}

impl Tally {
    fn step(mut self, devices: u32, seconds: u64) -> Step {
        self.latencies.sort_unstable();
        Step {
            devices,
            rows_per_s: self.rows as f64 / seconds as f64,
            p50_ms: self.percentile_ms(50),
            p99_ms: self.percentile_ms(99),
            shed: self.shed,
            errors: self.errors,
            server_memory: None,
        }
    }

    /// Nearest rank, of sorted latencies; 0 if there are none.
    fn percentile_ms(&self, percent: usize) -> f64 {
        let rank = (self.latencies.len() * percent).div_ceil(100);
        let latency = self.latencies.get(rank.saturating_sub(1)).copied().unwrap_or_default();
        latency.as_secs_f64() * 1e3
    }
}

/// The server's memory, as its metrics tell it.
async fn server_memory(at: SocketAddr) -> anyhow::Result<u64> {
    const NAME: &str = "process_resident_memory_bytes ";
    let scrape = async {
        let mut stream = TcpStream::connect(at).await?;
        stream.write_all(format!("GET /metrics HTTP/1.1\r\nhost: {at}\r\n\r\n").as_bytes()).await?;
        let mut text = String::new();
        stream.read_to_string(&mut text).await?;
        Ok::<_, std::io::Error>(text)
    };
    let text = scrape.await.with_context(|| format!("--metrics {at} does not answer"))?;
    let value = text.lines().find_map(|line| line.strip_prefix(NAME)?.parse().ok());
    value.with_context(|| format!("--metrics {at}: found no {NAME}among the metrics"))
}
