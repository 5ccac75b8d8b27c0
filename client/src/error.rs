//! What can go wrong on the device.

use crate::sample::SamplerError;
use crate::text::TextError;

/// The result of this crate's operations.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// An error of this crate. A lost server is none: it ends in marked, degraded output.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The model file is unusable.
    #[error(transparent)]
    Model(#[from] outrigger_experts::Error),
    /// The model's tokenizer or chat template is unusable.
    #[error(transparent)]
    Text(#[from] TextError),
    /// A sampling parameter means nothing.
    #[error(transparent)]
    Sampler(#[from] SamplerError),
    /// A setting that means nothing.
    #[error("{field}: found {found}, expected {expected}")]
    Setting {
        /// Which.
        field: &'static str,
        /// Its value.
        found: String,
        /// What it may be.
        expected: &'static str,
    },
    /// [`Engine::open`](crate::Engine::open) was called from outside of a tokio runtime.
    #[error(
        "there is no tokio runtime here: open the engine from within one, and keep that as long as the engine"
    )]
    NoRuntime,
    /// A server's address is no address.
    #[error("server `{url}`: expected host:port, http://host:port or https://host:port")]
    ServerUrl {
        /// What was given.
        url: String,
        /// What the parser said.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// A file that lists servers cannot be read.
    #[error("{}: cannot read the list of servers", path.display())]
    ServerFile {
        /// The file.
        path: std::path::PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
    /// The certificate authority cannot be read.
    #[error("{}: cannot read the certificate authority", path.display())]
    TlsCa {
        /// The file.
        path: std::path::PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
    /// The certificate that the device shows, or its key, cannot be used.
    #[error("the device's certificate or its key cannot be used")]
    TlsIdentity {
        /// What TLS says of it.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The file whose approximations were to stand in for experts is no pack of the model.
    #[error("{}: found {found}, expected {expected}", path.display())]
    StandIns {
        /// The file.
        path: std::path::PathBuf,
        /// What it is.
        found: String,
        /// What would do.
        expected: String,
    },
    /// A file is no routing trace.
    #[error("{}: found {found}, expected {expected}", path.display())]
    Trace {
        /// The file.
        path: std::path::PathBuf,
        /// What it has, and where.
        found: String,
        /// What would do.
        expected: String,
    },
    /// The texts that a pack's experts are fitted to are too short.
    #[error("calibration texts of {found} tokens, expected at least {expected}")]
    Calibration {
        /// Tokens that were given.
        found: usize,
        /// Tokens that are needed.
        expected: usize,
    },
    /// Not even the experts' mean outputs fit a pack's budget.
    #[error("a budget of {found} bytes for experts, expected at least {least}: their mean outputs")]
    PackBudget {
        /// What was asked for.
        found: u64,
        /// What is needed.
        least: u64,
    },
    /// The pack's place is the full model's.
    #[error("{}: found the full model, expected another place for its pack", .0.display())]
    Output(std::path::PathBuf),
    /// The model's matrices cannot be coded.
    #[error("rows of {found} weights cannot be coded: expected a multiple of 32, at most 15392")]
    Width {
        /// Weights a row.
        found: usize,
    },
    /// Another process makes the same pack.
    #[error("{}: another process is packing to it: wait until it has finished", .0.display())]
    Packing(std::path::PathBuf),
    /// Where packing keeps its unfinished work there is something else, which it would remove.
    #[error("{}: found a file that no pack left here, expected only unfinished work or nothing", .0.display())]
    NotWork(std::path::PathBuf),
    /// What packing keeps beside its output went away while it ran.
    #[error(
        "layer {layer} of the unfinished pack is gone: another program removed it; start again"
    )]
    Interrupted {
        /// The layer.
        layer: usize,
    },
    /// A file could not be read or written.
    #[error("{}", path.display())]
    Io {
        /// The file.
        path: std::path::PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
    /// Experts can run nowhere, and the configuration says to fail rather than degrade.
    #[error(
        "layer {layer}: experts {experts:?} are neither here nor on a server that answers ({reason})"
    )]
    Missing {
        /// The layer.
        layer: usize,
        /// The experts.
        experts: Vec<u16>,
        /// Why no server ran them.
        reason: String,
    },
    /// The session's KV cache is full.
    #[error(
        "the context holds {capacity} tokens, {wanted} are needed; raise it with a larger context"
    )]
    ContextFull {
        /// Positions that the cache has.
        capacity: usize,
        /// Positions that were asked for.
        wanted: usize,
    },
    /// The context that was asked for is unusable.
    #[error("a context of {wanted} tokens: expected 1 to {limit}, which the model was trained for")]
    Context {
        /// What was asked for.
        wanted: usize,
        /// The model's own limit.
        limit: usize,
    },
    /// A token id is not in the vocabulary.
    #[error("token id {id}: the vocabulary has {vocab}")]
    TokenId {
        /// The id.
        id: u32,
        /// The size of the vocabulary.
        vocab: usize,
    },
    /// [`OnMiss::Wait`](crate::OnMiss::Wait), and no server is configured that could bring what the device lacks.
    #[error(
        "on-miss: found wait, expected a server: without one, experts that the device lacks never come"
    )]
    NobodyToWaitFor,
    /// What the model computed is no number: its weights are damaged, or it is not what its header says.
    #[error("what the model makes of token {position} is not a number: its weights are damaged")]
    NotANumber {
        /// The token's position in the text.
        position: usize,
    },
    /// A session was stepped before it was given a token.
    #[error("the session is empty: push a token before the first step")]
    Empty,
    /// Every token of a session was computed already, and none sampled or pushed since.
    #[error("nothing is pending: push a token before the next step")]
    NothingPending,
}
