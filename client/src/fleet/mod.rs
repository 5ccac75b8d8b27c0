//! The servers as the device sees them: who is up, who holds what, and calls to them.
//!
//! Every server has a task that probes it while it is down, so that no token ever waits for a connection.

mod dispatch;
mod server;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use outrigger_experts::Fingerprint;
use outrigger_router::{Site, State as LinkState};
use tokio::sync::Notify;
use tokio::task::JoinSet;
use tokio::time::Instant;

use crate::config::EngineConfig;
use crate::error::Result;
pub(crate) use dispatch::{Flight, Landed, Outgoing};
use server::{Held, Server};

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
    /// Smoothed round trip, without the server's compute.
    pub trip: Duration,
    /// The last fault, if any.
    pub fault: Option<String>,
}

/// All configured servers. Dropping it ends their tasks.
#[derive(Debug)]
pub(crate) struct Fleet {
    servers: Vec<Arc<Server>>,
    identity: Arc<Identity>,
    config: EngineConfig,
    /// Notified whenever a server comes up.
    up: Arc<Notify>,
    /// Nothing leaves the device while this is set.
    offline: AtomicBool,
    requests: AtomicU64,
    _tenders: JoinSet<()>,
}

impl Fleet {
    /// Starts tending to the configured servers; needs a tokio runtime if there are any.
    ///
    /// # Errors
    /// An address that is none, or an unreadable certificate authority.
    pub(crate) fn open(config: &EngineConfig, identity: Identity) -> Result<Fleet> {
        let (identity, up, epoch) = (Arc::new(identity), Arc::new(Notify::new()), Instant::now());
        let mut tenders = JoinSet::new();
        let mut servers = Vec::with_capacity(config.servers.len());
        for (id, url) in config.servers.iter().enumerate() {
            let server =
                Arc::new(Server::new(id as u16, url, config, identity.clone(), up.clone(), epoch)?);
            tenders.spawn(server.clone().tend());
            servers.push(server);
        }
        Ok(Fleet {
            servers,
            identity,
            config: config.clone(),
            up,
            offline: AtomicBool::new(false),
            requests: AtomicU64::new(0),
            _tenders: tenders,
        })
    }

    /// Waits until every server is up, or for `patience`; whether they are.
    pub(crate) async fn wait_up(&self, patience: Duration) -> bool {
        let until = Instant::now() + patience;
        while self.servers.iter().any(|server| !server.is_up()) {
            if Instant::now() >= until {
                return false;
            }
            self.wait_for_change().await;
        }
        true
    }

    /// Waits until some server comes up, or a moment: a wake-up may have gone by before this was called.
    pub(crate) async fn wait_for_change(&self) {
        let _ = tokio::time::timeout(Duration::from_millis(20), self.up.notified()).await;
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
        !self.is_offline() && self.servers.iter().any(|server| server.is_up())
    }

    /// The servers that may be asked now, without those that already failed in this layer.
    pub(crate) fn roster(&self, failed: &[u16]) -> Roster {
        let usable = |server: &&Arc<Server>| !self.is_offline() && !failed.contains(&server.id);
        let entries = self.servers.iter().filter(usable);
        Roster(entries.filter_map(|server| server.entry()).collect())
    }

    /// Rows that every server takes in one request, at most `most`.
    pub(crate) fn batch_rows(&self, most: usize) -> usize {
        self.servers.iter().filter_map(|server| server.max_rows()).fold(most, usize::min)
    }

    /// Sends each server its part of a layer; returns at once.
    pub(crate) fn start(&self, outgoing: Outgoing<'_>, deadline: Instant) -> Flight {
        dispatch::start(self, outgoing, deadline)
    }

    /// Why the last call or probe failed, of the server that failed last.
    pub(crate) fn last_fault(&self) -> String {
        if self.is_offline() {
            return "the device is set offline".to_owned();
        }
        let faults = self.servers.iter().filter_map(|server| server.last_fault());
        match faults.max_by_key(|fault| fault.0) {
            Some((_, fault)) => fault,
            None if self.servers.is_empty() => "no server is configured".to_owned(),
            None if !self.any_up() => "no server has answered yet".to_owned(),
            None => "no server holds them".to_owned(),
        }
    }

    /// Every server's state, in the order of the configuration.
    pub(crate) fn status(&self) -> Vec<ServerStatus> {
        self.servers.iter().map(|server| server.status()).collect()
    }
}

/// One moment's usable servers.
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
