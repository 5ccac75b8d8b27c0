//! The model file, the quantised kernels, the expert cache and the expert FFN.
//!
//! The only crate with `unsafe`: memory maps, SIMD and the thread pool live here, behind safe interfaces.

mod activations;
mod bandwidth;
mod cache;
mod error;
mod ffn;
pub mod gguf;
mod map;
mod matmul;
mod memory;
mod model;
pub mod ops;
mod pool;
mod quant;
mod store;
pub mod synth;
mod tensor;
mod types;
pub mod vq;

pub use activations::Activations;
pub use bandwidth::read_bandwidth;
pub use cache::{Budget, Cache, Decision, Eviction, LayerStats, Lru};
pub use error::{Error, Result};
pub use ffn::{FfnScratch, Group, run_experts};
pub use gguf::{Fingerprint, Gguf, Metadata};
pub use map::Mapping;
pub use matmul::{matmul, matmul_many};
pub use memory::memory_limit;
pub use model::{
    Arch, ExpertLayer, ExpertTensors, Gating, LayerTensors, Model, ModelSpec, QkNorm, RopeSpec,
    RopeStyle, SharedExpert, StandIn, pack_names,
};
pub use pool::Pool;
pub use quant::{ActFormat, Kernels, cpu_features, dequantize, quantize};
pub use store::{CacheStats, Elsewhere, ExpertStore, Pinned, Refused, Residency};
pub use tensor::{Tensor, checksum};
pub use types::{GgmlType, Mat};
