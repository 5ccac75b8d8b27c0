//! The model file: what opens, what is refused and in which words, what is written, and what it costs in memory.

mod common;
mod faults;
mod files;
mod fingerprint;
#[cfg(target_os = "linux")]
mod map;
mod model;
mod mutations;
mod shards;
mod synth;
mod writer;
