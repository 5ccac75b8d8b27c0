//! `--private`: nothing leaves the device, whatever is configured.

use std::net::TcpListener;
use std::process::{Command, Output};

/// Generates a little with a server configured; whether anybody came to its door, and what was said.
fn run(flags: &[&str]) -> (bool, String) {
    let door = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = door.local_addr().unwrap().to_string();
    let model = concat!(env!("CARGO_MANIFEST_DIR"), "/../models/demo.gguf");
    let Output { status, stderr, .. } = Command::new(env!("CARGO_BIN_EXE_outrigger"))
        .args(["run", "-m", model, "-p", "Once", "-n", "2", "--expert-cache", "40%"])
        .args(["--elsewhere", "absent", "--server", &address])
        .args(flags)
        .env("OUTRIGGER_SERVERS", &address)
        .env("OUTRIGGER_TOKEN", "a-token-of-this-device")
        .output()
        .unwrap();
    let stderr = String::from_utf8(stderr).unwrap();
    assert!(status.success(), "{stderr}");
    door.set_nonblocking(true).unwrap();
    (door.accept().is_ok(), stderr)
}

#[test]
fn private_asks_nobody_and_says_so() {
    let (asked, _) = run(&["--deadline", "50"]);
    assert!(asked, "without it, the server is asked");
    let (asked, stderr) = run(&["--private"]);
    assert!(!asked && stderr.contains("private: nothing leaves this device"), "{stderr}");
}
