//! What callers were answered, counted for Prometheus.

use std::time::Duration;

use hyper::StatusCode;
use prometheus_client::encoding::{EncodeLabelSet, text};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::{Registry, Unit};

/// What the last line of a text for Prometheus is.
const END: &str = "# EOF\n";

/// Requests by path and status, and how long callers wait.
#[derive(Debug)]
pub(super) struct Counts {
    registry: Registry,
    requests: Family<Answered, Counter>,
    answered: Family<Path, Histogram, fn() -> Histogram>,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct Answered {
    path: &'static str,
    status: u16,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct Path {
    path: &'static str,
}

impl Counts {
    pub(super) fn new() -> Counts {
        let mut registry = Registry::with_prefix("outrigger_http");
        let requests = Family::<Answered, Counter>::default();
        registry.register("requests", "Requests, by status", requests.clone());
        // 1 ms to 131 s.
        let times = || Histogram::new(exponential_buckets(1e-3, 2.0, 18));
        let answered: Family<Path, Histogram, fn() -> Histogram> =
            Family::new_with_constructor(times);
        let help = "From a request's head to its answer's: with a stream, to the first of the text";
        registry.register_with_unit("answer", help, Unit::Seconds, answered.clone());
        Counts { registry, requests, answered }
    }

    pub(super) fn answer(&self, path: &str, status: StatusCode, took: Duration) {
        let path = known(path);
        self.requests.get_or_create(&Answered { path, status: status.as_u16() }).inc();
        self.answered.get_or_create(&Path { path }).observe(took.as_secs_f64());
    }

    /// The OpenMetrics text of it all, behind that of the engine.
    pub(super) fn text(&self, engine: &str) -> String {
        let mut out = engine.strip_suffix(END).unwrap_or(engine).to_owned();
        text::encode(&mut out, &self.registry).expect("a string takes everything");
        out
    }
}

/// A path that there is, since callers make up others without end.
fn known(path: &str) -> &'static str {
    const KNOWN: [&str; 5] =
        ["/v1/chat/completions", "/v1/completions", "/v1/models", "/health", "/metrics"];
    KNOWN.into_iter().find(|known| *known == path).unwrap_or("other")
}
