//! What `deploy/` says agrees with the binary.

mod common;

use std::collections::BTreeSet;
use std::process::Command;

use common::*;
use outrigger_experts::Model;
use outrigger_proto::v1::Encoding;
use serde_json::Value;

fn deploy(file: &str) -> String {
    std::fs::read_to_string(repo("deploy").join(file)).expect(file)
}

/// The flags under `args:` of a manifest, or in the values of a kustomization's patches.
fn flags(manifest: &str) -> Vec<String> {
    let lines = manifest.lines().map(str::trim_start);
    let flags =
        lines.filter_map(|line| line.split_once(' ').filter(|(_, flag)| flag.starts_with("--")));
    flags
        .filter(|(key, _)| ["-", "value:"].contains(key))
        .map(|(_, flag)| flag.to_owned())
        .collect()
}

#[test]
fn the_binary_takes_the_flags_of_the_manifests() {
    let base = flags(&deploy("kubernetes/base/statefulset.yaml"));
    for shard in ["low", "high"] {
        let more = flags(&deploy(&format!("kubernetes/two-shards/{shard}/kustomization.yaml")));
        assert!(base.len() >= 5 && more.len() == 1, "{base:?} {more:?}");
        let mut command = Command::new(env!("CARGO_BIN_EXE_outrigger-server"));
        let output = command.arg("serve").args(&base).args(&more).output().unwrap();
        // Not 2, which a flag that is not known gives: it looks for the certificate, which is not here.
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(1), "{stderr}");
        assert!(stderr.contains("/tls/tls.crt"), "{stderr}");
    }
}

#[test]
fn the_binary_takes_the_variables_of_the_unit() {
    let variables = deploy("systemd/server.env");
    let variables = variables.lines().filter(|line| !line.starts_with('#'));
    let mut variables: Vec<_> = variables.map(|line| line.split_once('=').unwrap()).collect();
    // That one is the unit's.
    variables.retain(|(name, _)| *name != "OUTRIGGER_ARGS");
    let mut command = Command::new(env!("CARGO_BIN_EXE_outrigger-server"));
    let help = command.args(["serve", "--help"]).output().unwrap().stdout;
    let help = String::from_utf8(help).unwrap();
    assert!(variables.len() >= 5);
    for (name, _) in &variables {
        assert!(help.contains(name), "{name}");
    }
    let mut command = Command::new(env!("CARGO_BIN_EXE_outrigger-server"));
    let output = command.arg("serve").envs(variables).output().unwrap();
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{stderr}");
    assert!(stderr.contains("/etc/outrigger/cert.pem"), "{stderr}");
}

/// As `[env: OUTRIGGER_LISTEN=]`.
#[test]
fn every_variable_that_the_binary_takes_is_told() {
    let mut command = Command::new(env!("CARGO_BIN_EXE_outrigger-server"));
    let help =
        String::from_utf8(command.args(["serve", "--help"]).output().unwrap().stdout).unwrap();
    let names = help.split("[env:").skip(1).map(|rest| rest.split('=').next().unwrap().trim());
    let manual = deploy("../docs/deployment.md");
    let told = |name: &str| manual.contains(&format!("| `{name}` |"));
    let (known, unknown): (Vec<_>, Vec<_>) = names.partition(|name| told(name));
    assert!(known.len() >= 10 && unknown.is_empty(), "{unknown:?} of {known:?}");
}

#[test]
fn the_image_that_is_built_is_the_one_that_runs() {
    let image = concat!("outrigger-server:", env!("CARGO_PKG_VERSION"));
    for file in ["Dockerfile", "kubernetes/base/statefulset.yaml", "../docs/deployment.md"] {
        assert!(deploy(file).contains(image), "{file}: {image}");
    }
}

#[test]
fn ports_and_grace_fit_the_flags() {
    let manifest = deploy("kubernetes/base/statefulset.yaml");
    for (flag, port) in [("listen", 7070), ("health", 7071), ("metrics", 9090)] {
        assert!(manifest.contains(&format!("--{flag}=0.0.0.0:{port}\n")), "{flag}");
        assert!(manifest.contains(&format!("containerPort: {port}\n")), "{flag}");
    }
    assert_eq!(manifest.matches("grpc:\n              port: 7071\n").count(), 3, "three probes");
    let drain = outrigger_server::ServerConfig::default().drain_timeout.as_secs();
    let grace = "terminationGracePeriodSeconds: ";
    let seconds = manifest.split_once(grace).and_then(|(_, rest)| rest.lines().next()).unwrap();
    assert!(seconds.parse::<u64>().unwrap() > drain);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_dashboard_and_the_alerts_ask_for_metrics_that_there_are() {
    let model = Model::open(&demo()).unwrap();
    let mut server = start(config(&demo())).await;
    let request = Job::random(&model, 0, 1, 4, 1).request(&model, Encoding::Q80);
    server.client.forward(request).await.unwrap();
    let text = server.metrics.text();
    let there: BTreeSet<&str> =
        text.lines().filter_map(|line| line.split(['{', ' ']).next()).collect();

    let dashboard: Value = serde_json::from_str(&deploy("grafana/outrigger-server.json")).unwrap();
    let panels = dashboard["panels"].as_array().unwrap();
    let targets = panels.iter().flat_map(|panel| panel["targets"].as_array().unwrap());
    let panels: Vec<&str> = targets.map(|target| target["expr"].as_str().unwrap()).collect();
    for (queries, least) in [(panels.join("\n"), 15), (deploy("prometheus/rules.yaml"), 5)] {
        let words = queries.split(|c: char| !c.is_ascii_alphanumeric() && c != '_');
        let ours = |word: &&str| word.starts_with("outrigger_") || word.starts_with("process_");
        let asked: BTreeSet<&str> = words.filter(ours).collect();
        assert!(asked.len() >= least, "{asked:?}");
        let unknown: Vec<_> = asked.difference(&there).collect();
        assert!(unknown.is_empty(), "{unknown:?}");
    }
}
