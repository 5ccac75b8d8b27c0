//! `outrigger eval`: its figures against formulas written for reading, on logits that it saved, and what it refuses.
#![cfg(feature = "cli")]

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use serde_json::Value;
use tempfile::TempDir;

const TALE: &str = "Once upon a time there was a king who had three sons, and the youngest of them was called the \
    fool, because he said little and gave away what he had. One day the king fell ill, and no doctor in the land could \
    help him. Then an old woman came to the gate and said that far beyond the mountains there was a well, and whoever \
    drank of its water would be whole again.";
const CODE: &str = "fn main() {\n    let mut total = 0;\n    for i in 0..10 {\n        if i % 2 == 0 {\n            total \
    += i;\n        }\n    }\n    println!(\"{}\", total);\n}\n\n#[derive(Debug)]\nstruct Point {\n    x: f32,\n    y: \
    f32,\n}\n\nimpl Point {\n    fn new(x: f32, y: f32) -> Point {\n        Point { x, y }\n    }\n}\n";
/// Half of the experts, the others nowhere.
const HALF: [&str; 4] = ["--expert-cache", "50%", "--elsewhere", "absent"];

fn repository(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(path)
}

fn demo() -> PathBuf {
    repository("models/demo.gguf")
}

fn tiny() -> PathBuf {
    repository("tests/fixtures/qwen3moe/model.gguf")
}

/// A fixture's token ids.
fn tokens(fixture: &str) -> Vec<u32> {
    let path = repository("tests/fixtures").join(fixture).join("tokens.json");
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

fn ids(tokens: &[u32]) -> String {
    tokens.iter().map(u32::to_string).collect::<Vec<_>>().join(",")
}

fn command(model: &Path, args: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_outrigger"));
    for name in ["RUST_LOG", "OUTRIGGER_SERVERS", "OUTRIGGER_EXPERT_CACHE", "OUTRIGGER_CTX_SIZE"] {
        command.env_remove(name);
    }
    command.args(["eval", "-t", "1", "-m"]).arg(model).args(args).output().unwrap()
}

/// The lines of JSON that `eval` prints.
fn eval(model: &Path, args: &[&str]) -> Vec<Value> {
    let Output { status, stdout, stderr } = command(model, &[args, &["--json"]].concat());
    assert!(status.success(), "{}", String::from_utf8_lossy(&stderr));
    String::from_utf8(stdout).unwrap().lines().map(|l| serde_json::from_str(l).unwrap()).collect()
}

/// The last line, all texts together.
fn total(model: &Path, args: &[&str]) -> Value {
    eval(model, args).pop().expect("a line")
}

/// What `eval` says when it must not run.
fn refused(model: &Path, args: &[&str]) -> String {
    let Output { status, stderr, .. } = command(model, args);
    assert_eq!(status.code(), Some(1));
    String::from_utf8(stderr).unwrap()
}

#[track_caller]
fn close(figures: &Value, name: &str, expected: f64) {
    let found = figures[name].as_f64().expect(name);
    assert!((found - expected).abs() < 1e-9, "{name}: {found}, expected {expected}");
}

/// Passes of several rows use more experts of a layer than the cache holds.
#[test]
fn what_is_in_memory_changes_no_bit() {
    let dir = TempDir::new().unwrap();
    let run = |cache: &str, batch: &str| {
        let logits = dir.path().join(format!("{cache}-{batch}"));
        let args = ["--expert-cache", cache, "--batch", batch, "--save-logits"];
        let ids = ids(&(300..340).collect::<Vec<u32>>());
        let last = [logits.to_str().unwrap(), "--token-ids", &ids];
        let figures = total(&demo(), &[&args[..], &last].concat());
        (std::fs::read(&logits).unwrap(), figures)
    };
    let (resident, figures) = run("100%", "1");
    assert_eq!(figures["cache"]["misses"], 0);
    let model = outrigger::Model::open(&demo()).unwrap();
    let expert = model.experts[0].bytes_per_expert() as u64;
    for (cache, batch) in [("50%", "1"), ("25%", "1"), ("25%", "16"), ("0%", "1")] {
        let (logits, figures) = run(cache, batch);
        assert!(logits == resident, "{cache}, {batch} tokens a pass");
        let misses = figures["cache"]["misses"].as_u64().unwrap();
        assert!(misses > 0, "{cache}");
        assert_eq!(figures["cache"]["bytes_read"], misses * expert, "{cache}");
    }
}

/// Text files of different lengths in a folder.
fn texts() -> (TempDir, [String; 2]) {
    let folder = tempfile::tempdir().unwrap();
    let write = |name: &str, text: &str| {
        let path = folder.path().join(name);
        std::fs::write(&path, text).unwrap();
        path.to_str().unwrap().to_owned()
    };
    let files = [write("tale.txt", TALE), write("code.txt", CODE)];
    (folder, files)
}

#[test]
fn the_full_model_is_at_no_distance_from_itself() {
    let ids = ids(&tokens("demo")[..96]);
    let found = total(&demo(), &["--token-ids", &ids, "--window", "48", "--against-full"]);
    assert_eq!(found["tokens"], 2 * 47);
    for (name, exact) in [("ppl_ratio", 1.0), ("kl", 0.0), ("top1", 1.0), ("acceptance", 1.0)] {
        for part in ["", "_low", "_high"] {
            assert_eq!(found[format!("{name}{part}")], exact, "{name}{part}");
        }
    }
    assert_eq!(found["coverage"], 1.0);
    assert_eq!(found["standin"], 0.0);
    assert_eq!(found["first_divergence"], Value::Null);
    assert_eq!(found["healed_divergence"], 0.0);
}

/// Probabilities by row, `[rows, vocab]`, of a file of logits.
fn probabilities(path: &Path, rows: usize) -> Vec<Vec<f64>> {
    let bytes = std::fs::read(path).unwrap();
    let logits = bytes.as_chunks::<4>().0.iter().map(|b| f64::from(f32::from_le_bytes(*b)));
    let logits: Vec<f64> = logits.collect();
    let softmax = |row: &[f64]| {
        let sum: f64 = row.iter().map(|logit| logit.exp()).sum();
        row.iter().map(|logit| logit.exp() / sum).collect()
    };
    logits.chunks_exact(logits.len() / rows).map(softmax).collect()
}

fn likeliest(row: &[f64]) -> usize {
    (0..row.len()).max_by(|a, b| row[*a].total_cmp(&row[*b])).unwrap()
}

#[test]
fn figures_are_those_of_the_saved_logits() {
    const WINDOW: usize = 64;
    const CUT: usize = 24;
    let tokens = &tokens("demo")[..2 * WINDOW];
    let (ids, folder) = (ids(tokens), tempfile::tempdir().unwrap());
    let (ours, theirs) = (folder.path().join("ours.f32"), folder.path().join("theirs.f32"));
    let save = |path: &Path| path.to_str().unwrap().to_owned();
    let text = ["--token-ids", &ids, "--window", "64"];
    eval(&demo(), &[&text[..], &["--save-logits", &save(&theirs)]].concat());
    let flags = ["--offline-after", "24", "--against-full", "--save-logits", &save(&ours)];
    let found = total(&demo(), &[&text[..], &HALF, &flags].concat());

    let (q, p) = (probabilities(&ours, tokens.len()), probabilities(&theirs, tokens.len()));
    let scored = |row: &usize| (CUT..WINDOW - 1).contains(&(row % WINDOW));
    let rows: Vec<usize> = (0..tokens.len()).filter(scored).collect();
    let mean = |of: &dyn Fn(usize) -> f64| {
        rows.iter().map(|&row| of(row)).sum::<f64>() / rows.len() as f64
    };
    let next = |row: usize| tokens[row + 1] as usize;
    let differs = |row: &usize| likeliest(&p[*row]) != likeliest(&q[*row]);
    let nll = mean(&|row| -q[row][next(row)].ln());
    let full_nll = mean(&|row| -p[row][next(row)].ln());
    let pairs = |row: usize| p[row].iter().zip(&q[row]);

    assert_eq!(found["tokens"], rows.len());
    close(&found, "nll", nll);
    close(&found, "ppl_ratio", (nll - full_nll).exp());
    close(&found, "kl", mean(&|row| pairs(row).map(|(p, q)| p * (p / q).ln()).sum()));
    close(&found, "top1", mean(&|row| f64::from(!differs(&row))));
    close(&found, "acceptance", mean(&|row| pairs(row).map(|(p, q)| p.min(*q)).sum()));
    let first = rows.iter().copied().find(differs).expect("half a model says something else");
    assert_eq!(found["first_divergence"], first + 1);
    // Half of the experts are not enough, and the servers make it whole again.
    assert!(found["coverage"].as_f64().unwrap() < 0.95, "{found}");
    assert!(found["ppl_ratio_low"].as_f64().unwrap() > 1.0, "{found}");
    assert!(found["healed_divergence"].as_f64().unwrap() <= 1e-4, "{found}");
    for name in ["ppl_ratio", "kl", "top1", "acceptance"] {
        let part = |part: &str| found[format!("{name}{part}")].as_f64().unwrap();
        assert!(part("_low") < part("") && part("") < part("_high"), "{name}: {found}");
    }
}

/// Comparing and healing must not change what is compared: a cold device is one that never had a server.
#[test]
fn a_cold_device_is_one_without_servers() {
    let ids = ids(&tokens("demo")[..96]);
    let text = [&["--token-ids", &ids, "--window", "48"], &HALF[..]].concat();
    let alone = total(&demo(), &text);
    for cold in [&["--against-full"][..], &["--against-full", "--offline-after", "0"]] {
        let found = total(&demo(), &[&text[..], cold].concat());
        for name in ["tokens", "nll", "coverage", "tally"] {
            assert_eq!(found[name], alone[name], "{name} with {cold:?}");
        }
        assert!(found["healed_divergence"].as_f64().unwrap() <= 1e-4, "{found}");
    }
}

/// As the figures of a device that never had a server are wanted.
#[test]
fn a_private_device_is_alone_whatever_is_configured() {
    let ids = ids(&tokens("demo")[..48]);
    let text = [&["--token-ids", &ids, "--against-full"], &HALF[..]].concat();
    let alone = total(&demo(), &text);
    let configured =
        total(&demo(), &[&text[..], &["--private", "--server", "127.0.0.1:9"]].concat());
    assert!(alone["coverage"].as_f64().unwrap() < 1.0, "{alone}");
    for name in ["nll", "coverage", "ppl_ratio", "tally"] {
        assert_eq!(configured[name], alone[name], "{name}");
    }
}

#[test]
fn the_first_tokens_of_a_text_are_those_of_all_of_it() {
    let (folder, [tale, _]) = texts();
    let long = folder.path().join("long.txt");
    std::fs::write(&long, TALE.repeat(40)).unwrap();
    let first = |path: &str| total(&demo(), &["-f", path, "--tokens", "50"]);
    assert_eq!(first(&tale)["tokens"], 49);
    assert_eq!(first(long.to_str().unwrap())["nll"], first(&tale)["nll"]);
}

#[test]
fn texts_are_measured_apart_and_count_the_same() {
    let (_folder, [tale, code]) = texts();
    let flags =
        [&HALF[..], &["--offline-after", "16", "--window", "64", "--against-full"]].concat();
    let lines = eval(&demo(), &[&["-f", &tale, "-f", &code], &flags[..]].concat());
    let [first, second, all] = &lines[..] else { panic!("found {lines:?}") };
    for (found, file) in [(first, &tale), (second, &code)] {
        let mut alone = total(&demo(), &[&["-f", file], &flags[..]].concat());
        alone["seconds"] = found["seconds"].clone();
        for (name, figure) in alone.as_object().unwrap() {
            assert_eq!(&found[name], figure, "{name} of {file}");
        }
    }
    assert_ne!(first["tokens"], second["tokens"], "texts of different lengths");

    let both = |name: &str| [first, second].map(|figures| figures[name].as_f64().expect(name));
    for name in ["nll", "coverage", "standin", "kl", "top1", "acceptance"] {
        close(all, name, both(name).iter().sum::<f64>() / 2.0);
    }
    let [one, two] = both("ppl_ratio");
    close(all, "ppl_ratio", (one * two).sqrt());
    assert_eq!(all["tokens"].as_f64().unwrap(), both("tokens").iter().sum::<f64>());
    for name in ["local", "missing"] {
        let of = |figures: &Value| figures["tally"][name].as_u64().unwrap();
        assert_eq!(of(all), of(first) + of(second), "{name}");
    }
}

/// `model` with the fingerprint of the file that it was made from, as a pack has it: a string in front of the other
/// metadata, and a second one that fills it up to the tensors' alignment.
fn pretend_pack(model: &Path, pack: &Path) {
    let fingerprint = outrigger::Model::open(model).unwrap().gguf.fingerprint().to_string();
    let string = |text: &str| [&(text.len() as u64).to_le_bytes(), text.as_bytes()].concat();
    let pair = |key: &str, value: &str| [string(key), 8_u32.to_le_bytes().into(), string(value)];
    let mut added = pair("outrigger.fingerprint", &fingerprint).concat();
    let unfilled = added.len() + pair("filling", "").concat().len();
    added.extend(pair("filling", &"-".repeat(unfilled.next_multiple_of(32) - unfilled)).concat());

    let mut bytes = std::fs::read(model).unwrap();
    let pairs = u64::from_le_bytes(bytes[16..24].try_into().unwrap());
    bytes[16..24].copy_from_slice(&(pairs + 2).to_le_bytes());
    bytes.splice(24..24, added);
    std::fs::write(pack, bytes).unwrap();
}

#[test]
fn a_pack_is_compared_with_the_file_that_it_was_made_from() {
    let folder = tempfile::tempdir().unwrap();
    let pack = folder.path().join("pack.gguf");
    pretend_pack(&tiny(), &pack);
    let (ids, full) = (ids(&tokens("qwen3moe")), tiny());
    let text = ["--token-ids", &ids, "--against-full"];
    let found = total(&pack, &[&text[..], &[full.to_str().unwrap()]].concat());
    assert_eq!(found["ppl_ratio"], 1.0);

    let error = refused(&pack, &text);
    assert!(error.contains("pack.gguf: found a pack, expected the full model"), "{error}");
}

#[test]
fn another_model_is_not_the_full_one() {
    let full = repository("tests/fixtures/olmoe/model.gguf");
    let args = ["--token-ids", "1,2,3", "--against-full", full.to_str().unwrap()];
    let error = refused(&tiny(), &args);
    assert!(error.contains("olmoe/model.gguf is not the full model of"), "{error}");
    assert!(error.contains("qwen3moe/model.gguf: its fingerprint is"), "{error}");
}

#[test]
fn what_cannot_be_measured_is_refused() {
    let (folder, [tale, _]) = texts();
    let error = refused(&tiny(), &["-f", &tale, "-f", "no-such.txt"]);
    assert!(error.contains("cannot read no-such.txt"), "{error}");

    let error = refused(&tiny(), &["--token-ids", "1,2,3", "--offline-after", "2"]);
    assert!(error.contains("--offline-after leaves nothing of a window of 3 tokens"), "{error}");

    let short = folder.path().join("short.txt");
    std::fs::write(&short, "").unwrap();
    let error = refused(&tiny(), &["-f", short.to_str().unwrap()]);
    assert!(error.contains("short.txt: 0 tokens, at least 2 are needed"), "{error}");

    let long = ["--token-ids", "1,2,3", "-c", "64", "--window", "65"];
    let error = refused(&tiny(), &long);
    assert!(error.contains("--window: found 65, expected at most the context, 64"), "{error}");

    let trace = folder.path().join("no/where");
    let error = refused(&tiny(), &["--token-ids", "1,2,3", "--trace", trace.to_str().unwrap()]);
    assert!(!error.contains("model") && error.contains("no/where"), "{error}");

    let wait = ["--token-ids", "1,2,3", "--offline-after", "1", "--on-miss", "wait"];
    let error = refused(&tiny(), &wait);
    assert!(error.contains("--on-miss wait would wait for ever"), "{error}");
}

#[test]
fn token_ids_beyond_the_vocabulary_are_refused() {
    let error = refused(&demo(), &["--token-ids", "1,2,99999"]);
    assert!(error.contains("--token-ids: token id 99999: the vocabulary has 4096"), "{error}");
}

#[test]
fn no_output_replaces_what_must_be_kept() {
    let (folder, [tale, code]) = texts();
    let error = refused(&tiny(), &["-f", &tale, "--tokens", "20", "--save-logits", &tale]);
    assert!(error.contains("tale.txt: found a file of") && error.contains("a new one"), "{error}");
    let error = refused(&tiny(), &["-f", &tale, "--tokens", "20", "--trace", &code]);
    assert!(error.contains("code.txt: found a file that is no routing trace"), "{error}");
    let model = folder.path().join("model.gguf");
    std::fs::copy(tiny(), &model).unwrap();
    let error = refused(&model, &["-f", &tale, "--trace", model.to_str().unwrap()]);
    assert!(error.contains("model.gguf: found a file that is no routing trace"), "{error}");
    assert_eq!(std::fs::read_to_string(&tale).unwrap(), TALE);
    assert_eq!(std::fs::read_to_string(&code).unwrap(), CODE);
    assert!(std::fs::read(&model).unwrap() == std::fs::read(tiny()).unwrap());
}

#[test]
fn a_trace_is_replaced_by_one_text_but_not_cut_by_two() {
    let (folder, [tale, code]) = texts();
    let trace = folder.path().join("trace");
    let one = |tokens| {
        let args = ["-f", &tale, "--tokens", tokens, "--trace", trace.to_str().unwrap()];
        assert!(command(&tiny(), &args).status.success());
        std::fs::read(&trace).unwrap()
    };
    let (long, short) = (one("40"), one("20"));
    assert!(short.len() < long.len() && long.starts_with(&short));
    let two = ["-f", &tale, "-f", &code, "--trace", trace.to_str().unwrap()];
    let error = refused(&tiny(), &two);
    assert!(error.contains("--trace: found 2 texts, expected one"), "{error}");
    assert!(std::fs::read(&trace).unwrap() == short);
}

#[test]
fn people_see_a_row_a_text_and_the_interval() {
    let (_folder, [tale, code]) = texts();
    let args =
        [&HALF[..], &["-f", &tale, "-f", &code, "--tokens", "32", "--against-full"]].concat();
    let Output { stdout, .. } = command(&demo(), &args);
    let stdout = String::from_utf8(stdout).unwrap();
    let first_words: Vec<_> = stdout.lines().map(|l| l.split("  ").next().unwrap()).collect();
    assert_eq!(first_words[..6], ["text", &tale, &code, "all", "95 % from", "to"], "{stdout}");
    assert!(first_words[6].starts_with("expert calls:"), "{stdout}");
    assert!(first_words[7].starts_with("against the full model:"), "{stdout}");
}
