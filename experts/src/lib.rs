//! The model file, the quantised kernels, the expert cache and the expert FFN.
//!
//! The only crate with `unsafe`: memory maps, SIMD and the thread pool live here, behind safe interfaces.

mod error;
mod types;

pub use error::{Error, Result};
pub use types::{GgmlType, Mat};
