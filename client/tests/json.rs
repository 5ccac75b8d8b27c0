//! What `--json` prints is what docs/json.md says.
#![cfg(feature = "cli")]

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

fn repository(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(path)
}

/// The names in the first column of the table whose first title is `title`.
fn documented(title: &str) -> BTreeSet<String> {
    let text = std::fs::read_to_string(repository("docs/json.md")).unwrap();
    let mut rows =
        text.lines().skip_while(|line| !line.starts_with(&format!("| {title} | what |")));
    rows.next().expect(title);
    let mut names = BTreeSet::new();
    for row in rows.skip(1).map_while(|line| line.strip_prefix("| ")) {
        let column = row.split(" | ").next().unwrap();
        let quoted = || column.split('`').skip(1).step_by(2);
        let suffixes = || quoted().filter(|name| name.starts_with('_'));
        for name in quoted().filter(|name| !name.starts_with('_')) {
            names.insert(name.to_owned());
            names.extend(suffixes().map(|suffix| format!("{name}{suffix}")));
        }
    }
    names
}

fn lines(args: &[&str]) -> Vec<Value> {
    let mut command = Command::new(env!("CARGO_BIN_EXE_outrigger"));
    command.env("OUTRIGGER_MODEL", repository("models/demo.gguf")).args(args).arg("--json");
    let output = command.output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let text = String::from_utf8(output.stdout).unwrap();
    text.lines().map(|line| serde_json::from_str(line).expect(line)).collect()
}

#[track_caller]
fn check(title: &str, found: &Value) {
    let names = found.as_object().expect("an object").keys().cloned().collect::<BTreeSet<_>>();
    assert_eq!(names, documented(title), "{title}");
}

#[test]
fn every_field_is_documented() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    let demo = repository("models/demo.gguf");
    let demo = demo.to_str().unwrap();

    let run = lines(&["run", "-p", "Once", "-n", "2"]);
    check("`run`", &run[0]);
    check("`run`, last", &run[2]);
    check("`tally`", &run[2]["tally"]);
    check("`demo`", &lines(&["demo", "-n", "3"])[0]);
    check("`bench`", &lines(&["bench", "-p", "8", "-n", "4", "-r", "1"])[0]);
    check("`inspect`", &lines(&["inspect", demo])[0]);

    let trace = path("trace");
    let text = ["--token-ids", "300,301,302,303,304", "--trace", &trace];
    let eval = lines(&[&["eval", "--against-full"], &text[..]].concat());
    check("`eval`", &eval[0]);
    check("`cache`", &eval[0]["cache"]);
    check("`replay`", &lines(&["replay", &trace])[0]);

    let (pack, words) = (path("pack.gguf"), path("words.txt"));
    std::fs::write(&words, "word ".repeat(2000)).unwrap();
    let fit = ["--calibrate", &words, "--calibration-tokens", "512"];
    check("`pack`", &lines(&[&["pack", "--budget", "10%", "-o", &pack], &fit[..]].concat())[0]);

    let scenario = repository("tests/scenarios/train-tunnels.toml");
    let out = path("out");
    check("`simulate`", &lines(&["simulate", scenario.to_str().unwrap(), "--out", &out])[0]);
}
