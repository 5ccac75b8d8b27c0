//! Experts in use.

use std::sync::Arc;

use super::ExpertStore;
use crate::error::Error;
use crate::model::ExpertTensors;

/// Experts of one layer that stay in memory until this is dropped, once they are there.
pub struct Pinned<'a> {
    store: &'a ExpertStore,
    layer: usize,
    /// What was pinned, including what is lost meanwhile.
    experts: Vec<u16>,
    /// How many of `experts` have arrived or are refused.
    seen: usize,
    refused: Vec<Refused>,
}

/// An expert that was asked for and cannot run here.
#[derive(Debug, Clone)]
pub struct Refused {
    /// The expert, in the layer that was asked for.
    pub expert: u16,
    /// Why.
    pub why: Arc<Error>,
}

impl<'a> Pinned<'a> {
    pub(super) fn new(
        store: &'a ExpertStore,
        layer: usize,
        experts: Vec<u16>,
        refused: Vec<Refused>,
    ) -> Pinned<'a> {
        Pinned { store, layer, experts, seen: 0, refused }
    }

    /// The next experts with their weights, in the order in which they were asked for: waits for one, and takes those
    /// behind it along that are in memory. None once all have arrived that can be had.
    pub fn arrivals(&mut self) -> Vec<(u16, ExpertTensors)> {
        let mut arrived = Vec::new();
        while let Some(&expert) = self.experts.get(self.seen) {
            if !arrived.is_empty() && !self.store.is_in(self.layer, expert) {
                break;
            }
            self.seen += 1;
            match self.store.wait_for(self.layer, expert) {
                Ok(()) => {
                    let layer = &self.store.model.experts[self.layer];
                    arrived.push((expert, layer.expert(expert.into())));
                }
                Err(why) => self.refused.push(Refused { expert, why }),
            }
        }
        arrived
    }

    /// The experts that were asked for and cannot run here, as far as is known: all once nothing arrives any more.
    pub fn refused(&self) -> &[Refused] {
        &self.refused
    }
}

impl Drop for Pinned<'_> {
    fn drop(&mut self) {
        self.store.release(self.layer, &self.experts);
    }
}
