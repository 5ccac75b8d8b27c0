//! `outrigger simulate`, as a user has it: what it says, what it writes, and what it refuses.
#![cfg(feature = "cli")]

use std::path::Path;
use std::process::{Command, Output};

use serde_json::Value;
use tempfile::TempDir;

/// A second on a good link.
const SCENARIO: &str = r#"
title = "A tunnel"
model = "demo.gguf"
length = "1s"
input.prompt = "Once upon a time"

[device]
expert_cache = "40%"
deadline = "300ms"
compute = { pass = "60ms", row = "4ms" }

[links."fields"]
round_trip = "20ms"

[[timeline]]
at = "0s"
link = "fields"
"#;

/// A directory with the scenario after some changes, each from what it says to what it is to say, and with the model.
fn directory(changes: &[(&str, &str)]) -> TempDir {
    let directory = tempfile::tempdir().unwrap();
    let mut scenario = SCENARIO.to_owned();
    for (from, to) in changes {
        assert!(scenario.contains(from), "{from}");
        scenario = scenario.replace(from, to);
    }
    std::fs::write(directory.path().join("tunnel.toml"), scenario).unwrap();
    let demo = Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/demo.gguf");
    std::fs::copy(demo, directory.path().join("demo.gguf")).unwrap();
    directory
}

fn command(directory: &TempDir, args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_outrigger"));
    command.env_remove("RUST_LOG").env_remove("OUTRIGGER_MODEL").current_dir(directory);
    command.args(["simulate", "tunnel.toml"]).args(args);
    command
}

/// Simulates what is in `directory`: whether it went well, and what it said where.
fn simulate(directory: &TempDir, args: &[&str]) -> (bool, String, String) {
    said(&mut command(directory, args))
}

fn said(command: &mut Command) -> (bool, String, String) {
    let Output { status, stdout, stderr } = command.output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (status.success(), text(stdout), text(stderr))
}

fn json(text: &str) -> Value {
    serde_json::from_str(text).expect("a JSON object")
}

/// What the device wrote is what it finds likely: a perplexity would read as better than the full model.
#[test]
fn a_text_that_the_model_wrote_has_no_perplexity() {
    let own = directory(&[]);
    let (success, stdout, stderr) = simulate(&own, &[]);
    assert!(success && stdout.contains("\nacceptance by the full model 1.000, KL"), "{stderr}");
    assert!(!stdout.contains("perplexity"), "{stdout}");
    let summary = std::fs::read_to_string(own.path().join("simulation/summary.json")).unwrap();
    for figure in ["ppl", "ppl_full", "ppl_ratio"] {
        assert_eq!(json(&summary)[figure], Value::Null);
    }
    let (_, stdout, _) = simulate(&directory(&[("prompt", "text")]), &["--json"]);
    assert_eq!(json(&stdout)["ppl_ratio"], 1.0);
}

#[test]
fn a_simulation_of_nothing_is_refused() {
    let text = "prompt = \"Once upon a time\"";
    let full = format!("prompt = \"{}\"", "a ".repeat(1023));
    for (changes, expected) in [
        (&[("\"1s\"", "\"0s\"")][..], "length: found 0s, expected more"),
        (&[(text, "prompt = ''")], "input: found a prompt of 0 tokens, expected at least 1"),
        (&[(text, "text = ''")], "input: found a text of 0 tokens, expected at least 2"),
        (&[(text, "text = 'O'")], "input: found a text of 1 tokens, expected at least 2"),
        (&[("link = \"fields\"", "link = \"cut\""), ("300ms", "2s")], "no token was made"),
        (&[(text, &full)], "no token was made"),
    ] {
        let (success, stdout, stderr) = simulate(&directory(changes), &[]);
        assert!(!success && stdout.is_empty(), "{expected}: {stdout}");
        assert!(stderr.starts_with(&format!("outrigger: tunnel.toml: {expected}")), "{stderr}");
    }
}

/// Neither a table's reader, nor a terminal, nor a picture's.
#[test]
fn names_command_nobody() {
    let odd = directory(&[("A tunnel", r"A \u0007tunnel"), (r#""fields""#, r#""a,b\"c""#)]);
    let (success, stdout, stderr) = simulate(&odd, &[]);
    assert!(success && stdout.starts_with("A \\u{7}tunnel"), "{stdout}{stderr}");
    let written = |name: &str| std::fs::read_to_string(odd.path().join("simulation").join(name));
    let tokens = written("tokens.csv").unwrap();
    assert!(tokens.lines().skip(1).all(|line| line.contains(r#","a,b""c","#)), "{tokens}");
    assert!(written("timeline.svg").unwrap().contains(">A tunnel</text>"));
}

/// Whether the scenario named it, the command line or a variable that was set long ago.
#[test]
fn the_model_that_is_used_is_named() {
    let dir = directory(&[("prompt", "text")]);
    std::fs::rename(dir.path().join("demo.gguf"), dir.path().join("other.gguf")).unwrap();
    let (success, _, stderr) = simulate(&dir, &[]);
    assert!(
        !success && stderr.contains("tunnel.toml: ") && stderr.contains("demo.gguf"),
        "{stderr}"
    );

    let variable =
        |value: &str, args: &[&str]| said(command(&dir, args).env("OUTRIGGER_MODEL", value));
    let (success, stdout, stderr) = variable("other.gguf", &[]);
    assert!(success && stdout.starts_with("A tunnel, other.gguf: "), "{stdout}{stderr}");
    let summary = std::fs::read_to_string(dir.path().join("simulation/summary.json")).unwrap();
    assert_eq!(json(&summary)["model"], "other.gguf");
    let (_, stdout, _) = variable("", &["-m", "other.gguf", "--sweep", "cache=50%"]);
    assert!(stdout.starts_with("A tunnel, other.gguf\n"), "{stdout}");
    let (_, stdout, _) = variable("other.gguf", &["--sweep", "cache=50%", "--json"]);
    assert_eq!(json(&stdout)["model"], "other.gguf");

    std::fs::write(dir.path().join("none.gguf"), "").unwrap();
    let (_, _, stderr) = variable("none.gguf", &[]);
    let expected = "outrigger: tunnel.toml with the model of OUTRIGGER_MODEL: ";
    assert!(stderr.starts_with(expected) && stderr.contains("none.gguf"), "{stderr}");
    let (_, _, stderr) = variable("other.gguf", &["-m", "none.gguf"]);
    assert!(stderr.starts_with("outrigger: tunnel.toml with the model of --model: "), "{stderr}");
}

/// The model is not there: it would be missed first if anything was computed before.
#[test]
fn a_place_that_takes_no_files_is_refused_before_anything_is_computed() {
    let dir = directory(&[("demo.gguf", "none.gguf")]);
    let mut places = vec!["tunnel.toml", "tunnel.toml/below"];
    if cfg!(target_os = "linux") {
        places.extend(["/proc", "/proc/below"]);
    }
    for place in places {
        let (success, _, stderr) = simulate(&dir, &["--out", place]);
        let expected = format!("outrigger: {place}: cannot write: ");
        assert!(!success && stderr.starts_with(&expected), "{stderr}");
    }
}
