//! `outrigger`: the device's command line.
fn main() {}
