//! The servers as the device sees them: who is up, who holds what, and calls to them.
//!
//! Every server has a task that probes it while it is down, so that no token ever waits for a connection.

mod dispatch;
mod error;
mod members;
mod server;
mod sources;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use outrigger_experts::Fingerprint;
use outrigger_router::{Site, State as LinkState};
use tokio::sync::Notify;
use tokio::time::Instant;
use tonic::transport::ClientTlsConfig;

use crate::config::EngineConfig;
use crate::error::Result;
use crate::metrics::Metrics;
pub(crate) use dispatch::{Flight, Landed, Outgoing};
use members::{Ending, Members};
use server::{Held, Server};
use sources::{Sources, Unfound};

/// The model as both sides must have it.
#[derive(Clone, Debug)]
pub(crate) struct Identity {
    pub(crate) fingerprint: Fingerprint,
    pub(crate) layers: usize,
    pub(crate) experts: usize,
    pub(crate) width: usize,
}

/// One server's state, for people and for metrics.
#[derive(Clone, Debug)]
pub struct ServerStatus {
    /// Its address.
    pub url: String,
    /// Whether it is used.
    pub state: LinkState,
    /// Experts that it holds, over all layers; 0 while that is not known.
    pub experts: usize,
    /// Smoothed round trip, without the server's compute.
    pub trip: Duration,
    /// Why the last call or probe failed, if it did.
    pub fault: Option<String>,
}

/// What the fleet and each of its servers go by.
#[derive(Debug)]
struct Shared {
    config: EngineConfig,
    tls: ClientTlsConfig,
    identity: Identity,
    metrics: Arc<Metrics>,
    /// Notified whenever a server comes up.
    up: Notify,
    /// From which links count time.
    epoch: Instant,
}

/// All servers that are known. Dropping it ends their tasks.
#[derive(Debug)]
pub(crate) struct Fleet {
    shared: Arc<Shared>,
    members: Arc<Members>,
    /// Nothing leaves the device while this is set.
    offline: AtomicBool,
    requests: AtomicU64,
    /// Draws of replicas so far.
    draws: AtomicU64,
    /// Looks at names and files again, where there are any.
    _lookout: Option<Ending>,
}

/// How often names are resolved and files read again.
const LOOK_EVERY: Duration = Duration::from_secs(2);

impl Fleet {
    /// Starts tending to the configured servers; needs a tokio runtime if there are any.
    ///
    /// # Errors
    /// An address that is none, an unreadable list of servers, or a certificate or authority that cannot be used.
    pub(crate) fn open(
        config: &EngineConfig,
        identity: Identity,
        metrics: Arc<Metrics>,
    ) -> Result<Fleet> {
        let mut sources = Sources::new(&config.servers, config.dial.clone())?;
        let shared = Arc::new(Shared {
            config: config.clone(),
            tls: server::tls(config)?,
            identity,
            metrics,
            up: Notify::new(),
            epoch: Instant::now(),
        });
        let members = Arc::new(Members::new(shared.clone(), !sources.may_change()));
        members.adopt(&sources.known())?;
        let lookout = sources.may_change().then(|| {
            let members = members.clone();
            Ending::of(tokio::spawn(async move {
                loop {
                    sources.look().await;
                    if let Err(error) = members.adopt(&sources.known()) {
                        tracing::warn!(
                            error = &error as &dyn std::error::Error,
                            "cannot use a server"
                        );
                    }
                    members.miss(sources.unfound());
                    members.looked.store(true, Ordering::Relaxed);
                    tokio::time::sleep(LOOK_EVERY).await;
                }
            }))
        });
        Ok(Fleet {
            shared,
            members,
            offline: AtomicBool::new(false),
            requests: AtomicU64::new(0),
            draws: AtomicU64::new(0),
            _lookout: lookout,
        })
    }

    /// Waits until every server is up, or for `patience`; whether they are.
    pub(crate) async fn wait_up(&self, patience: Duration) -> bool {
        let until = Instant::now().checked_add(patience);
        while !self.members.looked.load(Ordering::Relaxed)
            || !self.members.unfound().is_empty()
            || self.members.all().iter().any(|server| !server.is_up())
        {
            if until.is_some_and(|until| Instant::now() >= until) {
                return false;
            }
            self.wait_for_change().await;
        }
        true
    }

    /// Waits until some server comes up, or a moment: a wake-up may have gone by before this was called.
    pub(crate) async fn wait_for_change(&self) {
        let _ = tokio::time::timeout(Duration::from_millis(20), self.shared.up.notified()).await;
    }

    /// Cuts every server off, or ends that.
    pub(crate) fn set_offline(&self, offline: bool) {
        self.offline.store(offline, Ordering::Relaxed);
    }

    fn is_offline(&self) -> bool {
        self.offline.load(Ordering::Relaxed)
    }

    fn next_request_id(&self) -> u64 {
        self.requests.fetch_add(1, Ordering::Relaxed)
    }

    /// Whether any server may be asked now.
    pub(crate) fn any_up(&self) -> bool {
        !self.is_offline() && self.members.all().iter().any(|server| server.is_up())
    }

    /// The servers that may be asked now, without those that already failed in this layer. Of several that hold the
    /// same, two drawn at random: placement takes the faster (power of two choices, Mitzenmacher 2001), so that devices
    /// do not all run to the one that was fastest a moment ago.
    pub(crate) fn roster(&self, failed: &[u16]) -> Roster {
        if self.is_offline() {
            return Roster::default();
        }
        let members = self.members.all();
        let usable = members.iter().filter(|server| !failed.contains(&server.id));
        let draw = self.draws.fetch_add(1, Ordering::Relaxed);
        Roster(two_of_each(usable.filter_map(|server| server.entry()).collect(), draw))
    }

    fn server(&self, id: u16) -> Option<Arc<Server>> {
        self.members.all().iter().find(|server| server.id == id).cloned()
    }

    /// Rows that every server takes in one request, at most `most`.
    pub(crate) fn batch_rows(&self, most: usize) -> usize {
        self.members.all().iter().filter_map(|server| server.max_rows()).fold(most, usize::min)
    }

    /// Sends each server its part of a layer; returns when that is on its way.
    pub(crate) async fn start(&self, outgoing: Outgoing<'_>, patience: Duration) -> Flight {
        dispatch::start(self, outgoing, patience).await
    }

    /// Why the last call or probe failed, of the server that failed last.
    pub(crate) fn last_fault(&self) -> String {
        if self.is_offline() {
            return "the device is set offline".to_owned();
        }
        let members = self.members.all();
        let faults = members.iter().filter_map(|server| server.last_fault());
        if let Some((_, fault)) = faults.max_by_key(|fault| fault.0) {
            return fault;
        }
        match self.members.unfound().first() {
            Some(Unfound { server, why }) => format!("{server}: {why}"),
            None if self.shared.config.servers.is_empty() => "no server is configured".to_owned(),
            None if !self.any_up() => "no server has answered yet".to_owned(),
            None => "no server holds them".to_owned(),
        }
    }

    /// The state of every server, and of what was configured and leads to none.
    pub(crate) fn status(&self) -> Vec<ServerStatus> {
        let unfound = |unfound: &Unfound| ServerStatus {
            url: unfound.server.clone(),
            state: LinkState::Probing,
            experts: 0,
            trip: Duration::ZERO,
            fault: Some(unfound.why.clone()),
        };
        let (members, lost) = (self.members.all(), self.members.unfound());
        members.iter().map(|server| server.status()).chain(lost.iter().map(unfound)).collect()
    }
}

/// Of entries that hold the same at most two, which `draw` chooses.
fn two_of_each(mut entries: Vec<RosterEntry>, draw: u64) -> Vec<RosterEntry> {
    if entries.len() < 3 {
        return entries;
    }
    // Spreads successive draws (Steele, Lea and Flood, 2014).
    let key = |server: u16| {
        let z = (draw ^ u64::from(server) << 48).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9) >> 16
    };
    entries.sort_by_key(|entry| key(entry.server));
    let mut drawn: Vec<RosterEntry> = Vec::new();
    for entry in entries {
        if drawn.iter().filter(|other| other.held == entry.held).count() < 2 {
            drawn.push(entry);
        }
    }
    drawn
}

/// One moment's usable servers.
#[derive(Default)]
pub(crate) struct Roster(Vec<RosterEntry>);

pub(crate) struct RosterEntry {
    server: u16,
    held: Arc<Held>,
    trip: Duration,
    per_row: Duration,
}

impl Roster {
    /// The servers as placement wants them, for one layer.
    pub(crate) fn sites(&self, layer: usize) -> Vec<Site<'_>> {
        let sites = self.0.iter().map(|entry| Site {
            server: entry.server,
            holds: entry.held.layer(layer),
            trip: entry.trip,
            per_row: entry.per_row,
        });
        sites.collect()
    }
}

#[cfg(test)]
mod tests;
