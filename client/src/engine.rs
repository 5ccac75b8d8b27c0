//! The loaded model: immutable, shared by every session.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use outrigger_experts::{
    CacheStats, ExpertStore, Fingerprint, Gating, Model, ModelSpec, Pool, StandIn, memory_limit,
};
use outrigger_router::{Gate, Residency, Scoring};

use crate::config::{Elsewhere, EngineConfig, OnMiss, Reply};
use crate::error::{Error, Result};
use crate::fleet::{Fleet, Identity, ServerStatus};
use crate::kv::KvCache;
use crate::memory::{expert_budget, follow};
use crate::metrics::Metrics;
use crate::sample::SamplerConfig;
use crate::session::Session;
use crate::sizes::Sizes;
use crate::standins;
use crate::text::{ChatTemplate, Tokenizer};
use crate::trace::Recorder;
use crate::trunk::Trunk;

/// A model that is ready to run: weights mapped, experts cached, servers tended to.
pub struct Engine {
    pub(crate) config: EngineConfig,
    pub(crate) model: Arc<Model>,
    pub(crate) store: ExpertStore,
    /// By layer and expert; empty where there is no approximation at all.
    standins: Vec<Vec<Option<StandIn>>>,
    pub(crate) fleet: Fleet,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) gate: Gate,
    pub(crate) trunk: Trunk,
    pub(crate) pool: Pool,
    pub(crate) trace: Option<Recorder>,
    tokenizer: Tokenizer,
    template: ChatTemplate,
    context: usize,
}

impl fmt::Debug for Engine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Engine").field("config", &self.config).finish_non_exhaustive()
    }
}

impl Engine {
    /// Maps the model, sets up the expert cache, and greets the servers, for no longer than a second or one deadline; a
    /// server that is not there yet is found later.
    ///
    /// Needs a tokio runtime with time and IO. The tasks that look after the servers run there: keep it as long as the
    /// engine.
    ///
    /// # Errors
    /// A model file, tokenizer, setting or server address that is unusable; no runtime. A server that is down is no error.
    pub async fn open(config: EngineConfig) -> Result<Arc<Engine>> {
        tokio::runtime::Handle::try_current().map_err(|_| Error::NoRuntime)?;
        config.check()?;
        let model = Arc::new(Model::open(&config.model)?);
        let spec = &model.spec;
        let context = config.context.unwrap_or(spec.context.min(DEFAULT_CONTEXT));
        if context == 0 || context > spec.context {
            return Err(Error::Context { wanted: context, limit: spec.context });
        }
        let identity = Identity {
            fingerprint: model.gguf.fingerprint(),
            layers: spec.n_layers,
            experts: spec.n_experts,
            width: spec.n_embd,
        };
        let metrics = Metrics::new();
        let fleet = Fleet::open(&config, identity, metrics.clone())?;
        let standins = standins::open(&model, config.standins.as_deref())?;
        let sessions = KvCache::bytes(spec, config.kv_cache, context) * config.sessions as u64;
        let limit = memory_limit();
        let budget = expert_budget(&model, config.expert_cache, sessions, limit)?;
        let store = ExpertStore::open(model.clone(), budget, config.elsewhere)?;
        if !store.holds_all() {
            model.keep_trunk()?;
        }
        let lacks =
            model.is_pack() || (config.elsewhere == Elsewhere::Absent && !store.holds_all());
        if lacks && config.on_miss == OnMiss::Wait && config.servers.is_empty() {
            return Err(Error::NobodyToWaitFor);
        }
        let trace =
            config.trace.as_deref().map(|path| Recorder::create(path, &model)).transpose()?;
        let engine = Engine {
            gate: gate(spec),
            trunk: Trunk::new(&model),
            tokenizer: Tokenizer::from_gguf(model.gguf.meta())?,
            template: ChatTemplate::from_gguf(model.gguf.meta())?,
            pool: Pool::new(config.threads),
            context,
            standins,
            store,
            trace,
            fleet,
            metrics,
            model,
            config,
        };
        engine.fleet.wait_up(engine.config.deadline.min(GREETING)).await;
        let engine = Arc::new(engine);
        tokio::spawn(follow(Arc::downgrade(&engine), limit, memory_limit));
        Ok(engine)
    }

    /// Whether servers may round what they add up, so that the last digits depend on where experts ran.
    pub fn rounds(&self) -> bool {
        self.config.reply != Reply::Exact && !self.config.servers.is_empty()
    }

    /// Gives experts the memory that is left where this process may use `limit` bytes.
    pub(crate) fn fit_memory(&self, limit: Option<u64>) -> Result<()> {
        let session = KvCache::bytes(self.spec(), self.config.kv_cache, self.context);
        let sessions = session * self.config.sessions as u64;
        let budget = expert_budget(&self.model, self.config.expert_cache, sessions, limit)?;
        self.store.resize(budget.bytes(self.store.full_bytes())?);
        if !self.store.holds_all() {
            self.model.keep_trunk()?;
        }
        Ok(())
    }

    /// A new, empty timeline.
    ///
    /// # Errors
    /// A sampling parameter that means nothing, or a bias of a token that is not in the vocabulary.
    pub fn session(self: &Arc<Engine>, sampler: SamplerConfig) -> Result<Session> {
        Session::new(self.clone(), sampler)
    }

    /// The model's dimensions.
    pub fn spec(&self) -> &ModelSpec {
        &self.model.spec
    }

    /// What the servers must have too.
    pub fn fingerprint(&self) -> Fingerprint {
        self.model.gguf.fingerprint()
    }

    /// The model's tokenizer.
    pub fn tokenizer(&self) -> &Tokenizer {
        &self.tokenizer
    }

    /// The model's chat template.
    pub fn template(&self) -> &ChatTemplate {
        &self.template
    }

    /// Positions of a session.
    pub fn context(&self) -> usize {
        self.context
    }

    /// Every configured server's state.
    pub fn servers(&self) -> Vec<ServerStatus> {
        self.fleet.status()
    }

    /// Waits until every server is up, or for `patience`; whether they are.
    pub async fn wait_connected(&self, patience: Duration) -> bool {
        self.fleet.wait_up(patience).await
    }

    /// Asks no server any more, as if every link were cut, or ends that.
    pub fn set_offline(&self, offline: bool) {
        self.fleet.set_offline(offline);
    }

    /// Bytes by tier.
    pub fn sizes(&self) -> Sizes {
        Sizes::of(&self.model)
    }

    /// What the expert cache did so far.
    pub fn cache_stats(&self) -> CacheStats {
        self.store.stats()
    }

    /// Tokens, coverage, calls, bytes, round trips, links and cache so far, as OpenMetrics text for Prometheus.
    pub fn metrics(&self) -> String {
        self.metrics.text(&self.servers(), &self.cache_stats())
    }

    /// The expert cache.
    pub fn store(&self) -> &ExpertStore {
        &self.store
    }

    /// The approximation of an expert, if there is one that can stand in for it right now.
    pub(crate) fn standin(&self, layer: usize, expert: u16) -> Option<&StandIn> {
        let standin = self.standins.get(layer)?[usize::from(expert)].as_ref();
        standin.filter(|standin| standin.is_whole())
    }

    /// Where each expert of `layer` is, in the router's words.
    pub(crate) fn residency(&self, layer: usize) -> Vec<Residency> {
        let here = self.store.residency(layer).into_iter();
        here.map(|residency| match residency {
            outrigger_experts::Residency::Hot => Residency::Hot,
            outrigger_experts::Residency::Cold => Residency::Cold,
            outrigger_experts::Residency::Absent => Residency::Absent,
        })
        .collect()
    }
}

/// Models are trained for far longer contexts than most uses need, and the KV cache is reserved for all of it.
const DEFAULT_CONTEXT: usize = 4096;
/// The longest that opening waits for servers.
const GREETING: Duration = Duration::from_secs(1);

fn gate(spec: &ModelSpec) -> Gate {
    Gate {
        scoring: match spec.gating {
            Gating::Softmax => Scoring::Softmax,
            Gating::Sigmoid => Scoring::Sigmoid,
            Gating::SoftmaxAfterTopK => Scoring::SoftmaxAfterTopK,
        },
        n_experts: spec.n_experts,
        top_k: spec.n_used,
        normalise: spec.norm_weights,
        scale: spec.weights_scale,
    }
}
