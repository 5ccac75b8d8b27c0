//! Run a mixture-of-experts model that is too big for the device, on the device.
//!
//! The trunk, the router and the experts that matter most run here; a server holds the rest and answers over gRPC.
//! An [`Engine`] is the loaded model, a [`Session`] one timeline over it; every [`Token`] says what it was made of.
//!
//! ```no_run
//! # async fn example() -> outrigger::Result<()> {
//! use outrigger::{Engine, EngineConfig, SamplerConfig};
//!
//! let mut config = EngineConfig::new("models/demo.gguf");
//! config.servers.push("localhost:7070".to_owned());
//! let engine = Engine::open(config).await?;
//! let mut session = engine.session(SamplerConfig::default())?;
//! session.push_text("Once upon a time")?;
//! let token = session.step().await?;
//! println!("{} (coverage {:.2})", token.text, token.coverage);
//! # Ok(())
//! # }
//! ```
//!
//! A program without tokio makes a runtime, with at least one thread beside its own for the connections to servers, and
//! keeps it as long as the engine:
//!
//! ```no_run
//! # fn example() -> Result<(), Box<dyn std::error::Error>> {
//! use outrigger::{Engine, EngineConfig, SamplerConfig};
//!
//! let runtime = tokio::runtime::Runtime::new()?;
//! let engine = runtime.block_on(Engine::open(EngineConfig::new("models/demo.gguf")))?;
//! let mut session = engine.session(SamplerConfig::default())?;
//! session.push_text("Once upon a time")?;
//! println!("{}", runtime.block_on(session.step())?.text);
//! # Ok(())
//! # }
//! ```
#![forbid(unsafe_code)]

mod config;
mod credentials;
mod engine;
mod error;
mod fleet;
mod forward;
mod kv;
mod memory;
mod metrics;
mod moe;
pub mod pack;
mod pass;
mod prediction;
pub mod proxy;
mod sample;
#[cfg(feature = "serve")]
pub mod serve;
mod session;
#[cfg(feature = "simulate")]
pub mod simulate;
mod sizes;
mod standins;
pub mod text;
pub mod trace;
mod trunk;

pub use config::{Budget, Dial, Elsewhere, EngineConfig, KvType, OnMiss, Policy, Reply};
pub use credentials::{BearerToken, TlsIdentity};
pub use engine::Engine;
pub use error::{Error, Result};
pub use fleet::ServerStatus;
pub use outrigger_experts::{
    CacheStats, Error as ModelError, ExpertStore, Fingerprint, GgmlType, Model, ModelSpec,
    cpu_features, synth,
};
pub use outrigger_router::State as LinkState;
pub use pass::{Pass, Tally};
pub use prediction::{Distance, Prediction};
pub use sample::{Sampler, SamplerConfig, SamplerError, random_seed};
pub use session::{Session, Token};
pub use sizes::Sizes;
pub use tonic;
