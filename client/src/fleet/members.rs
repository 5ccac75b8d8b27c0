//! The servers of the moment: some join, some leave.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex};

use tokio::sync::Notify;
use tokio::task::{AbortHandle, JoinHandle};
use tokio::time::Instant;
use tonic::transport::ClientTlsConfig;

use super::Identity;
use super::server::Server;
use super::sources::{Address, Unfound};
use crate::config::EngineConfig;
use crate::error::Result;
use crate::metrics::Metrics;

/// The servers of the moment, each with the task that tends to it.
#[derive(Debug)]
pub(super) struct Members {
    config: EngineConfig,
    tls: ClientTlsConfig,
    identity: Arc<Identity>,
    metrics: Arc<Metrics>,
    /// Notified whenever a server comes up.
    pub(super) up: Arc<Notify>,
    /// What was configured and leads to no server.
    unfound: Mutex<Arc<Vec<Unfound>>>,
    /// Whether names and files were looked at.
    pub(super) looked: AtomicBool,
    epoch: Instant,
    now: Mutex<BTreeMap<Address, (Arc<Server>, Ending)>>,
    /// The same, ascending by id.
    all: Mutex<Arc<Vec<Arc<Server>>>>,
}

/// A task that ends with its owner.
#[derive(Debug)]
pub(super) struct Ending(AbortHandle);

impl Ending {
    pub(super) fn of(task: JoinHandle<()>) -> Ending {
        Ending(task.abort_handle())
    }
}

impl Drop for Ending {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl Members {
    pub(super) fn new(
        config: &EngineConfig,
        tls: ClientTlsConfig,
        identity: Arc<Identity>,
        metrics: Arc<Metrics>,
        looked: bool,
    ) -> Members {
        Members {
            config: config.clone(),
            tls,
            identity,
            metrics,
            up: Arc::new(Notify::new()),
            unfound: Mutex::default(),
            looked: AtomicBool::new(looked),
            epoch: Instant::now(),
            now: Mutex::default(),
            all: Mutex::default(),
        }
    }

    /// The servers, ascending by id.
    pub(super) fn all(&self) -> Arc<Vec<Arc<Server>>> {
        self.all.lock().expect("nothing panics under this lock").clone()
    }

    /// What was configured and leads to no server.
    pub(super) fn unfound(&self) -> Arc<Vec<Unfound>> {
        self.unfound.lock().expect("nothing panics under this lock").clone()
    }

    /// Replaces that.
    pub(super) fn miss(&self, unfound: Vec<Unfound>) {
        *self.unfound.lock().expect("nothing panics under this lock") = Arc::new(unfound);
    }

    fn server(&self, id: u16, address: &Address) -> Result<Server> {
        let (identity, metrics) = (self.identity.clone(), self.metrics.clone());
        let config = (&self.config, &self.tls);
        Server::new(id, address, config, identity, metrics, self.up.clone(), self.epoch)
    }

    /// Makes the members those of `wanted`: who stays keeps its connection, its id and what is known of it.
    ///
    /// # Errors
    /// An address that cannot be used; the others are adopted all the same.
    pub(super) fn adopt(&self, wanted: &[Address]) -> Result<()> {
        let mut now = self.now.lock().expect("nothing panics under this lock");
        now.retain(|address, _| {
            let stays = wanted.contains(address);
            if !stays {
                tracing::info!(server = %address, "left");
            }
            stays
        });
        let mut result = Ok(());
        for address in wanted {
            if now.contains_key(address) {
                continue;
            }
            let taken: BTreeSet<u16> = now.values().map(|(server, _)| server.id).collect();
            let Some(id) = (0..u16::MAX).find(|id| !taken.contains(id)) else { break };
            match self.server(id, address) {
                Ok(server) => {
                    let server = Arc::new(server);
                    let tending = Ending::of(tokio::spawn(server.clone().tend()));
                    tracing::info!(server = %address, "joined");
                    now.insert(address.clone(), (server, tending));
                }
                Err(error) => result = Err(error),
            }
        }
        let mut all: Vec<_> = now.values().map(|(server, _)| server.clone()).collect();
        all.sort_by_key(|server| server.id);
        *self.all.lock().expect("nothing panics under this lock") = Arc::new(all);
        result
    }
}
