//! Outrigger end to end: parity with oracles, degradation, network simulation.
