//! Reads the experts that are served as soon as the server runs, so that no device waits for its disk.

use std::sync::{Arc, Weak};
use std::thread::{self, JoinHandle};
use std::time::Instant;

use outrigger_experts::ExpertStore;

use crate::shard::Shard;
use crate::{Error, Result};

/// Reads them in the background, one after another, until all are there or the store is gone. None where the budget is not for
/// all of the model: what is kept then depends on what is asked for.
///
/// # Errors
/// [`Error::Thread`] where no thread can be started.
pub(crate) fn start(
    store: &Arc<ExpertStore>,
    shard: &Arc<Shard>,
) -> Result<Option<JoinHandle<()>>> {
    if !store.holds_all() {
        return Ok(None);
    }
    let (store, shard) = (Arc::downgrade(store), shard.clone());
    let reading = move || read(&store, &shard);
    let reading = thread::Builder::new().name("preload".into()).spawn(reading);
    reading.map(Some).map_err(|source| Error::Thread { name: "preload", source })
}

fn read(store: &Weak<ExpertStore>, shard: &Shard) {
    let (started, mut unreadable) = (Instant::now(), 0);
    for layer in shard.layers.clone() {
        for expert in shard.experts.clone() {
            let Some(store) = store.upgrade() else { return };
            let pinned = store.acquire(layer as usize, &[expert as u16]);
            let mut pinned = pinned.expect("a shard is part of its model");
            while !pinned.arrivals().is_empty() {}
            unreadable += pinned.refused().len();
        }
    }
    let took_ms = started.elapsed().as_millis() as u64;
    tracing::info!(unreadable, took_ms, "all experts that are served have been read");
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use outrigger_experts::{Budget, Elsewhere, Model};

    use super::*;
    use crate::ServerConfig;

    /// Bytes that are read of the demo model, of which only a part is served, with memory for `budget`.
    fn bytes_read(budget: Budget) -> (u64, u64) {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/demo.gguf");
        let model = Arc::new(Model::open(&path).unwrap());
        let config =
            ServerConfig { layers: Some(1..=2), experts: Some(3..=7), ..ServerConfig::default() };
        let shard = Arc::new(Shard::new(model.clone(), &config).unwrap());
        let store = Arc::new(ExpertStore::open(model, budget, Elsewhere::Cold).unwrap());
        if let Some(reading) = start(&store, &shard).unwrap() {
            reading.join().unwrap();
        }
        let served = 5 * (store.expert_bytes(1) + store.expert_bytes(2)) as u64;
        (store.stats().total().bytes_read, served)
    }

    #[test]
    fn what_is_served_is_read_before_anybody_asks() {
        let (read, served) = bytes_read(Budget::Fraction(1.0));
        assert_eq!(read, served);
    }

    #[test]
    fn nothing_is_read_where_not_all_can_stay() {
        let (read, _) = bytes_read(Budget::Fraction(0.5));
        assert_eq!(read, 0);
    }
}
