//! The command line as people and scripts have it: where it ends, what it says, and what it does not choke on.
#![cfg(feature = "cli")]

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use serde_json::Value;

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
fn a_run_ends_with_the_context_and_says_so() {
    let (success, stdout, stderr) =
        said(&mut outrigger(&["run", "-p", "Once", "--temp", "0", "-c", "24"]));
    assert!(success && stdout.starts_with("Once"), "{stderr}");
    assert!(stderr.ends_with("the context of 24 tokens is full\n"), "{stderr}");
    let (_, _, stderr) =
        said(&mut outrigger(&["run", "-p", "Once", "--temp", "0", "-c", "24", "-n", "8"]));
    assert!(stderr.starts_with("8 tokens") && !stderr.contains("is full"), "{stderr}");
}

/// As scripts for llama.cpp have it.
#[test]
fn minus_one_and_zero_say_the_default() {
    let run = |flags: &[&str]| {
        let usual = ["run", "-p", "Once", "--temp", "0", "-c", "24"];
        said(&mut outrigger(&[&usual[..], flags].concat())).1
    };
    assert_eq!(run(&["-n", "-1", "-s", "-1"]), run(&[]));
    let (success, _, stderr) = said(&mut outrigger(&["run", "-p", "Once", "-n", "2", "-c", "0"]));
    assert!(success, "{stderr}");
    let (success, _, stderr) = said(&mut outrigger(&["run", "-p", "Once", "-n", "-2"]));
    assert!(!success && stderr.contains("found `-2`, expected a number of tokens"), "{stderr}");
}

/// Two of these messages leave no room for an answer, and one of them does not fit at all.
#[test]
fn a_chat_goes_on_when_its_context_is_full() {
    let mut chat = outrigger(&["chat", "-c", "160", "-n", "64", "--system", "Tell tales."]);
    chat.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut chat = chat.spawn().unwrap();
    let too_long = "word ".repeat(200);
    let long = "word ".repeat(40);
    let talk = format!("{long}\n{long}\n{too_long}\n{long}\n");
    chat.stdin.take().unwrap().write_all(talk.as_bytes()).unwrap();
    let Output { status, stderr, .. } = chat.wait_with_output().unwrap();
    let stderr = String::from_utf8(stderr).unwrap();
    assert!(status.success(), "{stderr}");
    assert_eq!(stderr.matches(" tok/s, coverage 1.000").count(), 3, "{stderr}");
    assert!(stderr.contains("the oldest turns are forgotten"), "{stderr}");
    assert!(stderr.contains("the context holds 160: say less"), "{stderr}");
}

#[test]
fn an_answer_that_fills_the_context_ends_with_a_note() {
    let mut chat = outrigger(&["chat", "-c", "40", "-n", "512", "--temp", "0"]);
    chat.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut chat = chat.spawn().unwrap();
    chat.stdin.take().unwrap().write_all(b"Once upon a time there was a king\n").unwrap();
    let Output { status, stderr, .. } = chat.wait_with_output().unwrap();
    let stderr = String::from_utf8(stderr).unwrap();
    assert!(
        status.success() && stderr.starts_with("(the context of 40 tokens is full;"),
        "{stderr}"
    );
}

#[test]
fn a_demo_longer_than_the_context_fits_itself_to_it() {
    let (success, stdout, stderr) =
        said(&mut outrigger(&["demo", "-n", "90", "-c", "60", "--json"]));
    assert!(success && stderr.contains("the context holds 60 tokens"), "{stderr}");
    assert_eq!(stdout.lines().count(), 3);
}

/// A mark, and the line, are closed before anything else is said.
#[test]
fn an_error_leaves_no_line_open() {
    let part = ["--expert-cache", "10%", "--elsewhere", "absent", "--on-miss", "fail"];
    let (success, stdout, _) = said(outrigger(&["run", "-p", "Once", "--temp", "0"]).args(part));
    assert!(!success);
    assert_eq!(stdout, "Once\n");
}

#[test]
fn missing_servers_are_named_after_the_text() {
    let part = ["--expert-cache", "10%", "--elsewhere", "absent", "--server", "127.0.0.1:1"];
    let (_, stdout, stderr) =
        said(outrigger(&["run", "-p", "Once", "--temp", "0", "-n", "4"]).args(part));
    assert!(stdout.starts_with("Once[~") && stdout.ends_with("~]\n"), "{stdout}");
    assert!(stderr.contains("experts were missing: 127.0.0.1:1: "), "{stderr}");
}

#[cfg(target_os = "linux")]
#[test]
fn full_disks_are_errors_on_standard_output_and_nothing_on_standard_error() {
    let full = || std::fs::File::options().write(true).open("/dev/full").unwrap();
    let (success, _, stderr) = said(outrigger(&["completions", "bash"]).stdout(full()));
    assert!(!success && stderr.starts_with("outrigger: No space left"), "{stderr}");
    let run = ["run", "-p", "Once", "--temp", "0", "-n", "2"];
    let (success, stdout, _) = said(outrigger(&run).stderr(full()).env("RUST_LOG", "trace"));
    assert!(success && stdout.starts_with("Once"), "{stdout}");
}

#[test]
fn a_variable_that_is_empty_says_nothing() {
    let mut run = outrigger(&["run", "-p", "Once", "--temp", "0", "-n", "2"]);
    for name in ["SERVERS", "TOKEN", "THREADS", "CTX_SIZE", "EXPERT_CACHE", "METRICS", "TLS_CA"] {
        run.env(format!("OUTRIGGER_{name}"), "");
    }
    let (success, _, stderr) = said(run.env("RUST_LOG", ""));
    assert!(success && stderr.starts_with("2 tokens"), "{stderr}");
    let mut run = outrigger(&["run", "-p", "Once", "--temp", "0", "-n", "2"]);
    let (success, _, stderr) = said(run.env("OUTRIGGER_MODEL", ""));
    assert!(!success && stderr.contains("--model <FILE>"), "{stderr}");
}

#[test]
fn a_log_that_nobody_can_keep_is_refused() {
    let mut run = outrigger(&["run", "-p", "Once", "--temp", "0", "-n", "2"]);
    let (success, _, stderr) = said(run.env("RUST_LOG", "outrigger=loud"));
    assert!(
        !success && stderr.starts_with("outrigger: RUST_LOG: found `outrigger=loud`"),
        "{stderr}"
    );
}

#[test]
fn the_processor_is_shown_as_json_too() {
    let (_, plain, _) = said(&mut outrigger(&["inspect", "--cpu"]));
    let model = demo();
    for file in [None, model.to_str()] {
        let (_, stdout, _) = said(outrigger(&["inspect", "--cpu", "--json"]).args(file));
        let shown: Value = serde_json::from_str(&stdout).expect("a JSON object");
        assert_eq!(shown["cpu"], plain.trim_end());
    }
}

#[test]
fn a_models_name_commands_no_terminal() {
    let name = b"Outrigger demo 21M";
    let mut model = std::fs::read(demo()).unwrap();
    let at = model.windows(name.len()).position(|bytes| bytes == name).expect("its name");
    model[at..at + 4].copy_from_slice(b"\x1b[2J");
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.gguf");
    std::fs::write(&path, model).unwrap();
    let (success, stdout, stderr) = said(&mut outrigger(&["inspect", path.to_str().unwrap()]));
    assert!(success, "{stderr}");
    assert!(stdout.contains("\\u{1b}[2Jigger demo 21M") && !stdout.contains('\x1b'), "{stdout}");
}

#[test]
fn a_link_without_bandwidth_is_refused() {
    let (success, _, stderr) = said(&mut outrigger(&["proxy", "--to", "x:1", "--bandwidth", "0"]));
    assert!(!success && stderr.contains("--bandwidth"), "{stderr}");
}
