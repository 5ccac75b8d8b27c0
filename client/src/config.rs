//! What an engine is opened with.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::pin::Pin;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

pub use outrigger_experts::ops::KvType;
pub use outrigger_experts::{Budget, Elsewhere};
pub use outrigger_router::Policy;
use tonic::transport::{Channel, Endpoint};

use crate::credentials::{BearerToken, TlsIdentity};
use crate::error::{Error, Result};

/// What to do with an expert that nobody can run in time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OnMiss {
    /// Go on without it, as the [`Policy`] says, and mark the row.
    #[default]
    Degrade,
    /// Wait for a server, however long it takes.
    Wait,
    /// Fail with [`Error::Missing`](crate::Error::Missing).
    Fail,
}

impl FromStr for OnMiss {
    type Err = String;

    fn from_str(text: &str) -> Result<OnMiss, String> {
        match text {
            "degrade" => Ok(OnMiss::Degrade),
            "wait" => Ok(OnMiss::Wait),
            "fail" => Ok(OnMiss::Fail),
            _ => Err(format!("found `{text}`, expected degrade, wait or fail")),
        }
    }
}

/// How a server's sums come back.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Reply {
    /// 48 bits a value: adds up to the bits that the device itself would have computed.
    #[default]
    Exact,
    /// 32-bit floats: the last digit depends on where experts ran.
    F32,
    /// 16-bit floats: a third of the bytes down, about three digits.
    F16,
}

impl FromStr for Reply {
    type Err = String;

    fn from_str(text: &str) -> Result<Reply, String> {
        match text {
            "exact" => Ok(Reply::Exact),
            "f32" => Ok(Reply::F32),
            "f16" => Ok(Reply::F16),
            _ => Err(format!("found `{text}`, expected exact, f32 or f16")),
        }
    }
}

/// How servers are reached: by the system's resolver and over TCP, or however a test or a simulator does it.
#[derive(Clone)]
pub struct Dial {
    connect: Arc<dyn Fn(Endpoint) -> Channel + Send + Sync>,
    /// What a name stands for; none where names are left to `connect`.
    resolve: Option<Arc<Resolve>>,
}

type Resolve = dyn Fn(String, u16) -> Resolving + Send + Sync;
type Resolving = Pin<Box<dyn Future<Output = io::Result<Vec<SocketAddr>>> + Send>>;

impl Dial {
    /// Makes every connection with `connect`, which must not block. A name is one server.
    pub fn new(connect: impl Fn(Endpoint) -> Channel + Send + Sync + 'static) -> Dial {
        Dial { connect: Arc::new(connect), resolve: None }
    }

    /// Asks `resolve` again and again for the addresses of a host and port: each is a server.
    pub fn resolving<F>(self, resolve: impl Fn(String, u16) -> F + Send + Sync + 'static) -> Dial
    where
        F: Future<Output = io::Result<Vec<SocketAddr>>> + Send + 'static,
    {
        let resolve = move |host, port| -> Resolving { Box::pin(resolve(host, port)) };
        Dial { resolve: Some(Arc::new(resolve)), ..self }
    }

    pub(crate) fn dial(&self, endpoint: Endpoint) -> Channel {
        (self.connect)(endpoint)
    }

    /// Whether connections leave this process, as far as it is known: names are asked for.
    pub(crate) fn is_network(&self) -> bool {
        self.resolve.is_some()
    }

    /// Whether `host` is asked about. Numbers need no answer, and `localhost` is one server, whatever its addresses.
    pub(crate) fn resolves(&self, host: &str) -> bool {
        self.is_network() && host.parse::<IpAddr>().is_err() && host != "localhost"
    }

    /// The addresses of a host that [`Dial::resolves`].
    pub(crate) async fn resolve(&self, host: &str, port: u16) -> io::Result<Vec<SocketAddr>> {
        match &self.resolve {
            Some(resolve) => resolve(host.to_owned(), port).await,
            None => Ok(Vec::new()),
        }
    }
}

impl Default for Dial {
    fn default() -> Dial {
        Dial::new(|endpoint| endpoint.connect_lazy()).resolving(async |host, port| {
            Ok(tokio::net::lookup_host((host, port)).await?.collect())
        })
    }
}

impl std::fmt::Debug for Dial {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Dial")
    }
}

/// What an [`Engine`](crate::Engine) is opened with.
#[derive(Clone, Debug)]
pub struct EngineConfig {
    /// The GGUF file, or the first of its shards.
    pub model: PathBuf,
    /// Expert servers, `host:port`, `http://…` or `https://…`; every address of a name is one. `@FILE` lists more, one a
    /// line. Names and files are looked at again and again. None: everything runs here or degrades.
    pub servers: Vec<String>,
    /// Certificate authority (PEM) for `https` servers; the system's roots if absent.
    pub tls_ca: Option<PathBuf>,
    /// The certificate that `https` servers know this device by, if they want one.
    pub tls_identity: Option<TlsIdentity>,
    /// The token that servers know this device by, if they want one.
    pub token: Option<BearerToken>,
    /// Memory for experts.
    pub expert_cache: Budget,
    /// Where the experts are that the cache does not hold.
    pub elsewhere: Elsewhere,
    /// What to do with an expert that nobody can run in time.
    pub on_miss: OnMiss,
    /// How to go on without an expert.
    pub policy: Policy,
    /// A pack of the same model, whose approximations stand in for experts that can run nowhere. A model that is
    /// itself a pack brings its own.
    pub standins: Option<PathBuf>,
    /// How far experts on the device are favoured over what the gate chooses, as a fraction of the range of a row's
    /// router logits (arXiv 2412.00099), while no server is up. 0, the default, leaves the model's choice alone.
    pub prior: f32,
    /// Encoding of the servers' sums.
    pub reply: Reply,
    /// Threads that compute, the caller's included.
    pub threads: usize,
    /// Positions of one session's KV cache; the model's own limit if absent.
    pub context: Option<usize>,
    /// Sessions at a time: memory for their KV caches is left beside the experts.
    pub sessions: usize,
    /// How a session's keys and values are kept.
    pub kv_cache: KvType,
    /// The longest that one decoded token may wait for servers, over all its layers. A batch of rows waits longer
    /// in proportion: see [`EngineConfig::patience`].
    pub deadline: Duration,
    /// Where to record what the gate chooses, for replay: see [`trace`](crate::trace). It replaces no other file
    /// than a trace.
    pub trace: Option<PathBuf>,
    /// How connections are made.
    pub dial: Dial,
}

impl EngineConfig {
    /// The defaults: everything resident, no server, every core.
    pub fn new(model: impl Into<PathBuf>) -> EngineConfig {
        EngineConfig {
            model: model.into(),
            servers: Vec::new(),
            tls_ca: None,
            tls_identity: None,
            token: None,
            expert_cache: Budget::Fraction(1.0),
            elsewhere: Elsewhere::Cold,
            on_miss: OnMiss::Degrade,
            policy: Policy::Reroute,
            standins: None,
            prior: 0.0,
            reply: Reply::Exact,
            threads: std::thread::available_parallelism().map_or(1, usize::from),
            context: None,
            sessions: 1,
            kv_cache: KvType::F16,
            deadline: Duration::from_secs(1),
            trace: None,
            dial: Dial::default(),
        }
    }

    /// Whether every number means something.
    ///
    /// # Errors
    /// The first that does not.
    pub(crate) fn check(&self) -> Result<()> {
        const MOST_THREADS: usize = 1024;
        const MOST_SESSIONS: usize = 65_536;
        let checks = [
            (
                "prior",
                (0.0..=1.0).contains(&self.prior),
                self.prior.to_string(),
                "a number from 0 to 1",
            ),
            (
                "threads",
                (1..=MOST_THREADS).contains(&self.threads),
                self.threads.to_string(),
                "1 to 1024",
            ),
            (
                "sessions",
                (1..=MOST_SESSIONS).contains(&self.sessions),
                self.sessions.to_string(),
                "1 to 65536",
            ),
        ];
        match checks.into_iter().find(|(_, sound, ..)| !sound) {
            Some((field, _, found, expected)) => Err(Error::Setting { field, found, expected }),
            None => Ok(()),
        }
    }

    /// How long a pass over `rows` rows may wait for servers: a server computes rows of a batch one after another,
    /// so eight rows cost what one token may. With [`OnMiss::Wait`] only a dead connection ends a call.
    pub fn patience(&self, rows: usize) -> Duration {
        match self.on_miss {
            OnMiss::Wait => Duration::from_secs(3600),
            OnMiss::Degrade | OnMiss::Fail => {
                let times = u32::try_from(rows.div_ceil(8)).unwrap_or(u32::MAX).max(1);
                self.deadline.saturating_mul(times)
            }
        }
    }
}
