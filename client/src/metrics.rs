//! What the device did, counted for Prometheus.

use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use outrigger_experts::CacheStats;
use outrigger_router::State as LinkState;
use prometheus_client::encoding::{EncodeLabelSet, text};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::{Registry, Unit};

use crate::fleet::ServerStatus;
use crate::pass::Tally;
use crate::session::Token;

/// What an engine did since it was opened, over all of its sessions.
#[derive(Debug)]
pub(crate) struct Metrics {
    /// Locked while a text is made, for which some metrics are set anew.
    registry: Mutex<Registry>,
    tokens: Counter,
    provisional: Counter,
    coverage: Histogram,
    step: Histogram,
    calls: Family<Place, Counter>,
    up: Counter,
    down: Counter,
    round_trip: Family<Server, Histogram, fn() -> Histogram>,
    failures: Family<Failure, Counter>,
    link_up: Family<Server, Gauge>,
    hits: Counter,
    misses: Counter,
    evictions: Counter,
    read: Counter,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct Place {
    place: &'static str,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct Server {
    server: String,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct Failure {
    server: String,
    kind: &'static str,
}

impl Metrics {
    pub(crate) fn new() -> Arc<Metrics> {
        // 250 us to 8 s.
        let times = || Histogram::new(exponential_buckets(250e-6, 2.0, 16));
        let mut metrics = Metrics {
            registry: Mutex::new(Registry::with_prefix("outrigger")),
            tokens: Counter::default(),
            provisional: Counter::default(),
            coverage: Histogram::new([0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 0.999_999]),
            step: times(),
            calls: Family::default(),
            up: Counter::default(),
            down: Counter::default(),
            round_trip: Family::new_with_constructor(times),
            failures: Family::default(),
            link_up: Family::default(),
            hits: Counter::default(),
            misses: Counter::default(),
            evictions: Counter::default(),
            read: Counter::default(),
        };
        metrics.register();
        Arc::new(metrics)
    }

    fn register(&mut self) {
        let all = self.registry.get_mut().expect("no text was made yet");
        all.register("tokens", "Tokens sampled", self.tokens.clone());
        all.register(
            "tokens_provisional",
            "Those that rest on missing experts",
            self.provisional.clone(),
        );
        let help = "Arrived over routed weight of each token";
        all.register("coverage", help, self.coverage.clone());
        all.register_with_unit("step", "Time of each token", Unit::Seconds, self.step.clone());
        all.register(
            "expert_calls",
            "Routed rows times experts, by where they ran",
            self.calls.clone(),
        );
        all.register_with_unit("sent", "Requests to servers", Unit::Bytes, self.up.clone());
        all.register_with_unit("received", "Answers of servers", Unit::Bytes, self.down.clone());
        let (help, trips) = ("From a call to its checked answer", self.round_trip.clone());
        all.register_with_unit("round_trip", help, Unit::Seconds, trips);
        all.register("call_failures", "Calls without an answer of use", self.failures.clone());
        all.register("link_up", "1 for a server that is used", self.link_up.clone());
        all.register("cache_hits", "Uses of an expert that was in the cache", self.hits.clone());
        all.register("cache_misses", "Uses of an expert that was not", self.misses.clone());
        all.register("cache_evictions", "Experts that left to make room", self.evictions.clone());
        all.register_with_unit("cache_read", "Experts faulted in", Unit::Bytes, self.read.clone());
    }

    pub(crate) fn token(&self, token: &Token) {
        self.tokens.inc();
        self.provisional.inc_by(token.provisional.into());
        self.coverage.observe(token.coverage.into());
        self.step.observe(token.elapsed.as_secs_f64());
    }

    pub(crate) fn pass(&self, tally: &Tally) {
        let places = [
            ("local", tally.local),
            ("remote", tally.remote),
            ("missing", tally.missing),
            ("standin", tally.standin),
            ("substituted", tally.substituted),
        ];
        for (place, calls) in places {
            self.calls.get_or_create(&Place { place }).inc_by(calls);
        }
        self.up.inc_by(tally.bytes_up);
        self.down.inc_by(tally.bytes_down);
    }

    pub(crate) fn answered(&self, server: &str, took: Duration) {
        let server = Server { server: server.to_owned() };
        self.round_trip.get_or_create(&server).observe(took.as_secs_f64());
    }

    pub(crate) fn failed(&self, server: &str, kind: &'static str) {
        self.failures.get_or_create(&Failure { server: server.to_owned(), kind }).inc();
    }

    /// The OpenMetrics text of it all, with what others count.
    pub(crate) fn text(&self, servers: &[ServerStatus], cache: &CacheStats) -> String {
        let registry = self.registry.lock().expect("no text panics");
        self.link_up.clear();
        for status in servers {
            let up = status.state == LinkState::Up;
            let server = Server { server: status.url.clone() };
            self.link_up.get_or_create(&server).set(up.into());
        }
        let cache = cache.total();
        let counted = [
            (&self.hits, cache.hits),
            (&self.misses, cache.misses),
            (&self.evictions, cache.evictions),
            (&self.read, cache.bytes_read),
        ];
        for (counter, value) in counted {
            counter.inner().store(value, Ordering::Relaxed);
        }
        let mut out = String::new();
        text::encode(&mut out, &registry).expect("a string takes everything");
        out
    }
}
