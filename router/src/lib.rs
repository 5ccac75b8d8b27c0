//! Outrigger's pure decisions: gate, placement, degradation, link state, combine.
