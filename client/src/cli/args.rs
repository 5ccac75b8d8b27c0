//! Flags that several commands share.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result};
use clap::Args;
use outrigger::{
    Budget, Elsewhere, Engine, EngineConfig, Error, KvType, OnMiss, Policy, Reply, SamplerConfig,
    SamplerError, TlsIdentity, random_seed,
};

use super::view::{note, spinner};

/// Which model, on how much of the machine.
#[derive(Debug, Args)]
pub(crate) struct ModelArgs {
    /// Model file (GGUF), or the first of its shards
    #[arg(short, long, env = "OUTRIGGER_MODEL", value_name = "FILE")]
    pub(crate) model: PathBuf,
    #[command(flatten)]
    pub(crate) compute: ComputeArgs,
}

#[derive(Debug, Args)]
pub(crate) struct ThreadsArg {
    /// Threads that compute [default: every core]
    #[arg(short, long, env = "OUTRIGGER_THREADS", value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    threads: Option<u16>,
}

impl ThreadsArg {
    /// Puts the number in place of the default, if one was given.
    pub(crate) fn apply(&self, threads: &mut usize) {
        *threads = self.threads.map_or(*threads, usize::from);
    }
}

#[derive(Debug, Args)]
pub(crate) struct ComputeArgs {
    #[command(flatten)]
    threads: ThreadsArg,
    /// Tokens that a session holds; 0, the default: the model's, at most 4096
    #[arg(short, long = "ctx-size", env = "OUTRIGGER_CTX_SIZE", value_name = "N")]
    pub(crate) context: Option<usize>,
    /// How a session's keys and values are kept: f16, or q8_0 in half the memory
    #[arg(long, env = "OUTRIGGER_KV_CACHE", value_name = "f16|q8_0", default_value = "f16")]
    kv_cache: KvType,
}

/// Where experts run, and what happens when they cannot.
#[derive(Debug, Args)]
pub(crate) struct PlacementArgs {
    /// Expert server, host:port or http(s)://host:port, where every address of a name is one; or @FILE with one a line.
    /// May be given several times; names and files are looked at again and again
    #[arg(long = "server", env = "OUTRIGGER_SERVERS", value_name = "URL", value_delimiter = ',')]
    servers: Vec<String>,
    /// Certificate authority (PEM) for https servers [default: the system's]
    #[arg(long, env = "OUTRIGGER_TLS_CA", value_name = "FILE")]
    tls_ca: Option<PathBuf>,
    /// Certificate chain (PEM) to show to https servers that want one
    #[arg(long, value_name = "FILE", requires = "tls_key")]
    tls_cert: Option<PathBuf>,
    /// Private key (PEM) of that certificate
    #[arg(long, value_name = "FILE", requires = "tls_cert")]
    tls_key: Option<PathBuf>,
    /// File with the bearer token to show to servers [default: what OUTRIGGER_TOKEN says, if anything]
    #[arg(long, value_name = "FILE")]
    token_file: Option<PathBuf>,
    /// Nothing leaves the device, whatever is configured: no server is ever asked
    #[arg(long)]
    private: bool,
    /// Memory for experts: a size (2GiB) or a share of all experts (40%)
    #[arg(long, env = "OUTRIGGER_EXPERT_CACHE", value_name = "SIZE|PCT", default_value = "100%")]
    pub(crate) expert_cache: Budget,
    /// Experts outside the cache: `cold` in the local file, or `absent` from the device
    #[arg(long, value_name = "cold|absent", default_value = "cold")]
    pub(crate) elsewhere: Elsewhere,
    /// When an expert can run nowhere: degrade and mark it, wait for a server, or fail
    #[arg(long, value_name = "degrade|wait|fail", default_value = "degrade")]
    on_miss: OnMiss,
    /// How to degrade: leave-out, renormalise or reroute
    #[arg(long, value_name = "POLICY", default_value = "reroute")]
    pub(crate) policy: Policy,
    /// Approximations that stand in for experts that can run nowhere: a pack of the model, or a budget (8%), for which
    /// one is made at first and kept
    #[arg(long, value_name = "PCT|SIZE|FILE")]
    standins: Option<StandIns>,
    /// While no server is up, favour experts in memory over the model's choice, by this fraction of the router's
    /// range; 0 never
    #[arg(long, value_name = "P", default_value_t = 0.0, value_parser = fraction)]
    prior: f32,
    /// Longest wait for servers within one token, in milliseconds
    #[arg(long, value_name = "MS", default_value_t = 1000, value_parser = clap::value_parser!(u64).range(1..=3_600_000))]
    deadline: u64,
    /// Encoding of the servers' sums: exact, f32 (two thirds of the bytes) or f16 (a third)
    #[arg(long, value_name = "exact|f32|f16", default_value = "exact")]
    reply: Reply,
    /// Record what the gate chooses to FILE, for `outrigger replay`
    #[arg(long, value_name = "FILE")]
    pub(crate) trace: Option<PathBuf>,
}

/// Who may look on.
#[derive(Debug, Args)]
pub(crate) struct MetricsArgs {
    /// Where Prometheus finds /metrics; nowhere if absent
    #[arg(long, value_name = "ADDR", env = "OUTRIGGER_METRICS")]
    metrics: Option<SocketAddr>,
}

impl MetricsArgs {
    /// Shows what `engine` does for as long as the process lives.
    pub(crate) async fn publish(&self, engine: &Arc<Engine>) -> Result<()> {
        let Some(at) = self.metrics else { return Ok(()) };
        let listening = tokio::net::TcpListener::bind(at).await;
        let listener = listening.with_context(|| format!("cannot listen on {at} for /metrics"))?;
        note(format!("metrics on http://{}/metrics", listener.local_addr()?));
        let engine = engine.clone();
        tokio::spawn(outrigger_server::serve_metrics(listener, move || engine.metrics()));
        Ok(())
    }
}

/// How the next token is chosen.
#[derive(Debug, Args)]
pub(crate) struct SamplingArgs {
    /// Temperature; 0 takes the likeliest token
    #[arg(long, default_value_t = 0.8, allow_negative_numbers = true)]
    pub(crate) temp: f32,
    /// Keep the K likeliest tokens; 0 keeps all
    #[arg(long, value_name = "K", default_value_t = 40)]
    top_k: usize,
    /// Keep the likeliest tokens up to this probability
    #[arg(long, value_name = "P", default_value_t = 0.95)]
    top_p: f32,
    /// Drop tokens below this share of the likeliest one's probability
    #[arg(long, value_name = "P", default_value_t = 0.05)]
    min_p: f32,
    /// Seed of the choice; -1, the default: random
    #[arg(short, long, allow_negative_numbers = true)]
    seed: Option<Seed>,
}

/// Where stand-ins come from.
#[derive(Clone, Debug)]
enum StandIns {
    /// A pack that is there.
    File(PathBuf),
    /// A pack that is made at first.
    Budget(Budget),
}

impl FromStr for StandIns {
    type Err = std::convert::Infallible;

    fn from_str(text: &str) -> Result<StandIns, Self::Err> {
        Ok(match text.parse() {
            Ok(budget) if !Path::new(text).exists() => StandIns::Budget(budget),
            _ => StandIns::File(text.into()),
        })
    }
}

/// A number of tokens; -1 is without end, as for llama.cpp.
pub(crate) fn tokens(text: &str) -> Result<usize, String> {
    match text {
        "-1" => Ok(usize::MAX),
        _ => {
            text.parse().map_err(|_| format!("found `{text}`, expected a number of tokens, or -1"))
        }
    }
}

/// A seed; -1 is none, as for llama.cpp.
#[derive(Clone, Copy, Debug)]
struct Seed(Option<u64>);

impl FromStr for Seed {
    type Err = String;

    fn from_str(text: &str) -> Result<Seed, String> {
        match text {
            "-1" => Ok(Seed(None)),
            _ => match text.parse() {
                Ok(seed) => Ok(Seed(Some(seed))),
                Err(_) => Err(format!("found `{text}`, expected a whole number, or -1")),
            },
        }
    }
}

fn fraction(text: &str) -> Result<f32, String> {
    let value = text.parse().ok().filter(|value| (0.0..=1.0).contains(value));
    value.ok_or_else(|| format!("found `{text}`, expected a number from 0 to 1"))
}

impl PlacementArgs {
    /// The servers that may be asked.
    pub(crate) fn servers(&self) -> &[String] {
        if self.private { &[] } else { &self.servers }
    }

    /// The engine's configuration; makes the stand-ins if there are none yet.
    pub(crate) async fn config(
        &self,
        model: PathBuf,
        compute: &ComputeArgs,
    ) -> Result<EngineConfig> {
        let mut config = EngineConfig::new(model);
        config.standins = match &self.standins {
            Some(StandIns::Budget(budget)) => {
                Some(super::packing::cached(&config.model, *budget).await?)
            }
            Some(StandIns::File(path)) => Some(path.clone()),
            None => None,
        };
        config.prior = self.prior;
        config.servers = self.servers().to_vec();
        if self.private {
            note(format!(
                "private: nothing leaves this device; servers given: {}",
                self.servers.len()
            ));
        } else {
            config.token = secret(self.token_file.as_deref(), "OUTRIGGER_TOKEN")?;
            config.tls_identity = self.tls_identity()?;
        }
        config.tls_ca = self.tls_ca.clone();
        config.expert_cache = self.expert_cache;
        config.elsewhere = self.elsewhere;
        config.on_miss = self.on_miss;
        config.policy = self.policy;
        config.deadline = Duration::from_millis(self.deadline);
        config.reply = self.reply;
        config.trace = self.trace.clone();
        compute.apply(&mut config);
        Ok(config)
    }

    fn tls_identity(&self) -> Result<Option<TlsIdentity>> {
        let (Some(cert), Some(key)) = (&self.tls_cert, &self.tls_key) else { return Ok(None) };
        Ok(Some(TlsIdentity::from_pem(read(cert)?, read(key)?)))
    }
}

/// A secret from a file or else a variable, so that no command line shows it.
pub(super) fn secret<T: FromStr<Err = String>>(
    file: Option<&Path>,
    variable: &str,
) -> Result<Option<T>> {
    let (text, from) = match (file, from_env(variable)) {
        (Some(path), _) => (read(path)?, path.display().to_string()),
        (None, Some(text)) => (text, variable.to_owned()),
        (None, None) => return Ok(None),
    };
    text.parse().map(Some).map_err(|why| anyhow::anyhow!("{from}: {why}"))
}

/// What a variable says; one that is empty says nothing.
pub(super) fn from_env(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|text| !text.is_empty())
}

pub(super) fn read(path: &Path) -> Result<String> {
    std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))
}

impl ComputeArgs {
    pub(crate) fn apply(&self, config: &mut EngineConfig) {
        self.threads.apply(&mut config.threads);
        config.context = self.context.filter(|tokens| *tokens > 0);
        config.kv_cache = self.kv_cache;
    }
}

impl SamplingArgs {
    /// The seed, if it is not to be random.
    pub(crate) fn seed(&self) -> Option<u64> {
        self.seed.and_then(|Seed(seed)| seed)
    }

    /// # Errors
    /// A parameter that means nothing.
    pub(crate) fn config(&self) -> Result<SamplerConfig, SamplerError> {
        let config = SamplerConfig {
            temperature: self.temp,
            top_k: self.top_k,
            top_p: self.top_p,
            min_p: self.min_p,
            seed: self.seed().unwrap_or_else(random_seed),
            ..SamplerConfig::default()
        };
        config.check()?;
        Ok(config)
    }
}

/// Opens the engine and says what a user should know about the cache and the servers.
pub(crate) async fn open(config: EngineConfig) -> Result<Arc<Engine>> {
    let spinner = spinner("loading the model");
    let engine = Engine::open(config).await.map_err(|error| match error {
        Error::Model(_) | Error::Text(_) => {
            anyhow::Error::from(error).context("cannot open the model")
        }
        other => other.into(),
    })?;
    spinner.finish_and_clear();
    if let Some(warning) = engine.store().cliff() {
        note(format!("warning: {warning}"));
    }
    for server in engine.servers() {
        if server.state != outrigger::LinkState::Up {
            let fault = server.fault.as_deref().unwrap_or("it has not answered yet");
            note(format!("warning: server {} is not used yet: {fault}", server.url));
        }
    }
    Ok(engine)
}
