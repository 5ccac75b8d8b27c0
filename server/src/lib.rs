//! Outrigger's expert server: runs experts of one model for devices that hold only some of them.
//!
//! [`ExpertServer::open`] maps the model; [`ExpertServer::serve`] answers `outrigger.v1.Experts`,
//! `grpc.health.v1` and reflection on any stream of connections until it is told to stop. The way
//! of a request: `service` checks every field (`request`) and hands the work to the `queue`, whose
//! one compute thread runs what waits for the same layer as one batch (`engine`).
//!
//! The server keeps no session: a request is a pure function of its fields and the model, and its
//! answer has the same bits whatever else was in its batch.

#![forbid(unsafe_code)]

mod config;
mod connection;
mod delivery;
mod engine;
mod error;
mod listen;
mod metrics;
mod preload;
mod queue;
mod request;
mod seldom;
mod serve;
mod service;
mod shard;
mod stop;
mod tenants;
mod tls;
mod watch;

pub use config::{Compute, ServerConfig};
pub use error::{Error, Result};
pub use listen::{bind, check_exposure};
pub use metrics::{Metrics, serve_metrics};
pub use serve::{ExpertServer, serve_health};
pub use stop::{outlive_hangup, stop_signal};
pub use tenants::Tenants;
pub use tls::Tls;
