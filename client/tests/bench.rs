//! `outrigger bench`: that it measures what it says, not how much.

use std::process::{Command, Output};

use serde_json::Value;

fn bench(args: &[&str]) -> Output {
    let model = concat!(env!("CARGO_MANIFEST_DIR"), "/../models/demo.gguf");
    let mut command = Command::new(env!("CARGO_BIN_EXE_outrigger"));
    command.args(["bench", "-m", model, "-n", "2", "-r", "1"]).args(args);
    command.output().expect("it starts")
}

#[test]
fn it_decodes_behind_a_prompt_and_at_a_depth() {
    let out = bench(&["--prompt", "8", "--depth", "40", "--json"]);
    let report: Value = serde_json::from_slice(&out.stdout).expect("a JSON object");
    for key in ["prefill_tok_s", "decode_tok_s", "decode_at_depth_tok_s"] {
        assert!(report[key].as_f64().expect(key) > 0.0, "{report}");
    }
    assert_eq!(report["depth"], 40);
    let out = bench(&["--prompt", "8", "--json"]);
    let report: Value = serde_json::from_slice(&out.stdout).expect("a JSON object");
    assert!(report["depth"].is_null() && report["decode_at_depth_tok_s"].is_null(), "{report}");
}

#[test]
fn without_a_prompt_no_prefill_is_claimed() {
    let out = bench(&["--prompt", "0"]);
    let report = String::from_utf8_lossy(&out.stdout);
    assert!(report.contains("decode") && !report.contains("prefill"), "{report}");
    let out = bench(&["--prompt", "0", "--json"]);
    let report: Value = serde_json::from_slice(&out.stdout).expect("a JSON object");
    assert!(report["prefill_tok_s"].is_null() && report["decode_tok_s"].is_f64(), "{report}");
}

#[test]
fn without_all_experts_it_says_so_and_claims_no_bandwidth() {
    let part = ["--prompt", "8", "--expert-cache", "10%", "--elsewhere", "absent"];
    let out = bench(&part);
    let report = String::from_utf8_lossy(&out.stdout);
    assert!(report.starts_with("not the full model's speed: coverage 0."), "{report}");
    assert!(report.contains("no server is configured") && !report.contains("GB/s"), "{report}");
    let out = bench(&[&part[..], &["--json"]].concat());
    let report: Value = serde_json::from_slice(&out.stdout).expect("a JSON object");
    assert!(report["coverage"].as_f64().expect("coverage") < 1.0, "{report}");
    assert!(report["fault"].is_string() && report["gb_per_s"].is_null(), "{report}");
    let out = bench(&["--prompt", "8", "--json"]);
    let report: Value = serde_json::from_slice(&out.stdout).expect("a JSON object");
    assert_eq!(report["coverage"], 1.0);
    assert!(report["fault"].is_null() && report["gb_per_s"].is_f64(), "{report}");
}

#[test]
fn a_depth_beyond_the_context_is_refused() {
    let out = bench(&["--prompt", "8", "--depth", "40", "--ctx-size", "42"]);
    let error = String::from_utf8_lossy(&out.stderr);
    assert!(!out.status.success() && error.contains("a context of 43"), "{error}");
}
