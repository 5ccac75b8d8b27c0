//! The command line as people and scripts have it: where it ends, what it says, and what it does not choke on.
#![cfg(feature = "cli")]

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

fn demo() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/demo.gguf")
}

fn outrigger(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_outrigger"));
    command.env_remove("RUST_LOG").env("OUTRIGGER_MODEL", demo()).args(args);
    command
}

fn said(command: &mut Command) -> (bool, String, String) {
    let Output { status, stdout, stderr } = command.output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (status.success(), text(stdout), text(stderr))
}

#[test]
fn a_link_without_bandwidth_is_refused() {
    let (success, _, stderr) = said(&mut outrigger(&["proxy", "--to", "x:1", "--bandwidth", "0"]));
    assert!(!success && stderr.contains("--bandwidth"), "{stderr}");
}
