//! `outrigger-server`: the expert server.
fn main() {}
