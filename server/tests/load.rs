//! The load generator: what it counts is what the server did.

mod common;

use std::process::{Command, Output};

use common::*;
use outrigger_server::{ServerConfig, Tenants};
use serde_json::Value;

/// The steps that `load` prints.
async fn load(url: &str, args: &[&str]) -> Vec<Value> {
    let mut command = Command::new(env!("CARGO_BIN_EXE_outrigger-server"));
    command.args(["load", "--json", "--seconds", "1", "--warm-up", "0", "--server", url]);
    command.args(args).env("OUTRIGGER_LISTEN", "127.0.0.1:1").env_remove("RUST_LOG");
    let output = tokio::task::spawn_blocking(move || command.output().unwrap());
    let Output { status, stdout, stderr } = output.await.unwrap();
    assert!(status.success(), "{}", String::from_utf8_lossy(&stderr));
    let lines = String::from_utf8(stdout).unwrap();
    lines.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_step_for_each_number_of_devices() {
    let part = ServerConfig { layers: Some(1..=4), experts: Some(3..=9), ..config(&demo()) };
    let server = start(part).await;
    let steps = load(&server.url, &["--devices", "1,5", "-k", "4"]).await;
    assert_eq!(steps.iter().map(|step| &step["devices"]).collect::<Vec<_>>(), [1, 5]);
    for step in steps {
        // Only what the server holds is asked for, so that nothing is refused and everything counts.
        assert_eq!((&step["shed"], &step["errors"]), (&0.into(), &0.into()), "{step}");
        let number = |field: &str| step[field].as_f64().unwrap();
        assert!(number("rows_per_s") >= 4.0 && number("rows_per_s") % 4.0 == 0.0, "{step}");
        assert!(0.0 < number("p50_ms") && number("p50_ms") <= number("p99_ms"), "{step}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_queue_shows_as_shed_and_not_as_errors() {
    let server = start(ServerConfig { queue_rows: 1, threads: 1, ..config(&demo()) }).await;
    let steps = load(&server.url, &["--devices", "64", "-k", "32"]).await;
    assert!(steps[0]["shed"].as_u64().unwrap() > 0, "{}", steps[0]);
    assert_eq!(steps[0]["errors"], 0);
    assert!(steps[0]["rows_per_s"].as_f64().unwrap() > 0.0, "{}", steps[0]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tenant_gets_its_quota_and_no_more() {
    let token = "heart-0123456789abcdef";
    let tenants = Tenants::parse(&format!("heart {token} 100")).unwrap();
    let server = start(ServerConfig { tenants: Some(tenants), ..config(&demo()) }).await;
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("token");
    std::fs::write(&file, format!("{token}\n")).unwrap();
    let args = ["--devices", "4", "-k", "4", "--token-file", file.to_str().unwrap()];
    let step = load(&server.url, &args).await.remove(0);
    assert!(step["shed"].as_u64().unwrap() > 0, "{step}");
    assert_eq!(step["errors"], 0, "{step}");
    // What was in the bucket, what flowed in meanwhile, and what each device may have borrowed.
    let rows = step["rows_per_s"].as_f64().unwrap();
    assert!((4.0..=220.0).contains(&rows), "{step}");
}
