//! The model file, the quantised kernels, the expert cache and the expert FFN.
//!
//! The only crate with `unsafe`: memory maps, SIMD and the thread pool live here, behind safe interfaces.

mod error;
pub mod gguf;
mod map;
mod model;
mod tensor;
mod types;

pub use error::{Error, Result};
pub use gguf::{Fingerprint, Gguf, Metadata};
pub use map::Mapping;
pub use model::{
    Arch, ExpertLayer, ExpertTensors, Gating, LayerTensors, Model, ModelSpec, QkNorm, RopeSpec,
    RopeStyle, SharedExpert,
};
pub use tensor::Tensor;
pub use types::{GgmlType, Mat};
