//! What a server is told at its start.

use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::thread;
use std::time::Duration;

use outrigger_experts::Budget;

use crate::Tenants;

/// What an [`ExpertServer`](crate::ExpertServer) serves, and its limits.
#[derive(Clone, Debug)]
pub struct ServerConfig {
    /// The GGUF file, or the first of its shards.
    pub model: PathBuf,
    /// Layers to serve, from 0; all if `None`.
    pub layers: Option<RangeInclusive<u32>>,
    /// Experts to serve in each of those layers, from 0; all if `None`.
    pub experts: Option<RangeInclusive<u32>>,
    /// Threads that compute.
    pub threads: usize,
    /// Memory for experts. Those beyond it are read from the file when they are needed.
    pub expert_cache: Budget,
    /// Where requests are computed.
    pub compute: Compute,
    /// Rows that one request, and one batch of requests, may have.
    pub max_rows: u32,
    /// Rows that may wait to be computed; what comes on top is sent away.
    pub queue_rows: usize,
    /// The longest that a request is to wait until it is computed; what would wait longer is sent away.
    pub max_wait: Duration,
    /// From the head of a request to its answer; the caller's own deadline may be shorter.
    pub request_timeout: Duration,
    /// Connections at a time; those on top are closed at once.
    pub max_connections: usize,
    /// From a connection to its first request, with all handshakes; it is closed then.
    pub first_request_timeout: Duration,
    /// From one request of a connection to the next; it is closed then, even with a request in hand, so that it is to
    /// be longer than `request_timeout`.
    pub idle_timeout: Duration,
    /// How long a peer may take to read an answer, and to make room for any more of it; the connection is closed then.
    pub answer_timeout: Duration,
    /// Requests in flight on a connection; a peer that begins another is refused that one. Each may hold an answer in
    /// memory for `answer_timeout`.
    pub max_streams: u32,
    /// Who may ask, and how much; everyone if `None`.
    pub tenants: Option<Tenants>,
    /// How long work in hand may take after the signal to stop.
    pub drain_timeout: Duration,
}

impl Default for ServerConfig {
    fn default() -> ServerConfig {
        ServerConfig {
            model: PathBuf::new(),
            layers: None,
            experts: None,
            threads: thread::available_parallelism().map_or(1, |n| n.get()),
            expert_cache: Budget::Fraction(1.0),
            compute: Compute::Thread,
            max_rows: 512,
            queue_rows: 4096,
            max_wait: Duration::from_millis(200),
            request_timeout: Duration::from_secs(30),
            max_connections: 4096,
            first_request_timeout: Duration::from_secs(10),
            idle_timeout: Duration::from_secs(600),
            answer_timeout: Duration::from_secs(30),
            max_streams: 32,
            tenants: None,
            drain_timeout: Duration::from_secs(10),
        }
    }
}

/// Where requests are computed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Compute {
    /// On a thread of their own, batched, off the threads that do IO.
    #[default]
    Thread,
    /// In the handler, one by one: for simulated time and networks, which know no other threads.
    Inline,
}
