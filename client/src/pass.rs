//! What a pass over some rows was made of.

use std::ops::AddAssign;

use serde::Serialize;

/// Expert calls by where they ran, and what went over the wire.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Tally {
    /// Routed expert calls that ran on the device.
    pub local: u64,
    /// Routed expert calls that a server ran.
    pub remote: u64,
    /// Routed expert calls that ran nowhere.
    pub missing: u64,
    /// Those of the missing that an approximation on the device stood in for.
    pub standin: u64,
    /// Calls of other, resident experts in place of missing ones.
    pub substituted: u64,
    /// Bytes of requests.
    pub bytes_up: u64,
    /// Bytes of answers.
    pub bytes_down: u64,
}

impl AddAssign for Tally {
    fn add_assign(&mut self, other: Tally) {
        self.local += other.local;
        self.remote += other.remote;
        self.missing += other.missing;
        self.standin += other.standin;
        self.substituted += other.substituted;
        self.bytes_up += other.bytes_up;
        self.bytes_down += other.bytes_down;
    }
}

/// What one pass over some rows was made of, over all layers.
#[derive(Clone, Debug, Default)]
pub struct Pass {
    /// Calls and bytes.
    pub tally: Tally,
    /// Why experts are missing, if any are.
    pub fault: Option<String>,
    /// Routed weight of each row, summed over layers.
    routed: Vec<f64>,
    /// The part of it that ran as routed.
    arrived: Vec<f64>,
    /// The part of it that an approximation stood in for.
    stood_in: Vec<f64>,
}

impl Pass {
    pub(crate) fn new(rows: usize) -> Pass {
        let zeros = || vec![0.0; rows];
        Pass { routed: zeros(), arrived: zeros(), stood_in: zeros(), ..Pass::default() }
    }

    /// Rows of the pass.
    pub fn rows(&self) -> usize {
        self.routed.len()
    }

    /// Arrived over routed weight of a row: exactly 1.0 where nothing is missing.
    pub fn coverage(&self, row: usize) -> f32 {
        outrigger_router::coverage(self.arrived[row], self.routed[row])
    }

    /// Share of a row's routed weight that approximations on the device stood in for; coverage does not count it.
    pub fn standin(&self, row: usize) -> f32 {
        if self.stood_in[row] == 0.0 { 0.0 } else { (self.stood_in[row] / self.routed[row]) as f32 }
    }

    /// Counts one layer's mass of a row.
    pub(crate) fn add_mass(&mut self, row: usize, arrived: f64, stood_in: f64, routed: f64) {
        self.arrived[row] += arrived;
        self.stood_in[row] += stood_in;
        self.routed[row] += routed;
    }

    /// Leaves out the first `rows` rows; their calls stay in the tally.
    pub(crate) fn skip(&mut self, rows: usize) {
        for mass in [&mut self.routed, &mut self.arrived, &mut self.stood_in] {
            mass.drain(..rows);
        }
    }

    /// Appends another pass's rows.
    pub(crate) fn append(&mut self, other: Pass) {
        self.tally += other.tally;
        self.routed.extend(other.routed);
        self.arrived.extend(other.arrived);
        self.stood_in.extend(other.stood_in);
        self.fault = other.fault.or(self.fault.take());
    }
}
