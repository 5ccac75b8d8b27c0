//! Outrigger's pure decisions: no IO, no clock, no randomness that was not passed in.
//!
//! One layer of one batch goes through this crate like this:
//!
//! ```text
//! router logits --Gate::route--> Routing --group--> [Group] --place--> Placement
//!                                                                       |  local, remote, missing
//!      sums of every site --combine--> Partial --coverage--> 1.0 is exact
//!                                         |
//!      what no site ran --repair--> factors for the survivors, experts to run instead
//! ```
//!
//! A [`Prior`] has the gate prefer experts that are here: what it puts in place of the model's own
//! choice is [`favoured`], runs here and covers nothing.
//!
//! [`Link`] stands beside it: one state machine a server, which says whether that server may be
//! asked, how long an answer may take and when to look whether it is back.
//!
//! Architecture Invariant: everything here is a function of its arguments. The same events at the
//! same times give the same decisions, bit for bit, which is what lets the property tests and the
//! simulated network replay a failure from its seed.
#![forbid(unsafe_code)]

mod combine;
mod degrade;
mod gate;
mod link;
mod placement;
mod prior;

pub use combine::{Partial, combine, coverage};
pub use degrade::{Policy, Repair, repair};
pub use gate::{Gate, Routing, Scoring};
pub use link::{Failure, Link, State};
pub use placement::{Group, Placement, Residency, Site, group, place};
pub use prior::{Prior, favoured};
