//! The servers of the moment: some join, some leave.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex};

use tokio::task::{AbortHandle, JoinHandle};

use super::Shared;
use super::server::Server;
use super::sources::{Address, Unfound};
use crate::error::Result;

/// The servers of the moment, each with the task that tends to it.
#[derive(Debug)]
pub(super) struct Members {
    shared: Arc<Shared>,
    /// What was configured and leads to no server.
    unfound: Mutex<Arc<Vec<Unfound>>>,
    /// Whether names and files were looked at.
    pub(super) looked: AtomicBool,
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
    pub(super) fn new(shared: Arc<Shared>, looked: bool) -> Members {
        Members {
            shared,
            unfound: Mutex::default(),
            looked: AtomicBool::new(looked),
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
            match Server::new(id, address, self.shared.clone()) {
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
