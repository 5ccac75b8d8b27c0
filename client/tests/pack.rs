//! `outrigger pack`, as a user has it: killed half-way, and with a damaged result.

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

fn repository(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(path)
}

fn pack(out: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_outrigger"));
    command.args(["pack", "--budget", "20%", "--calibration-tokens", "2048", "-t", "2", "-m"]);
    command.arg(repository("models/demo.gguf")).arg("-o").arg(out);
    command.stdout(Stdio::null()).stderr(Stdio::null());
    command
}

fn outrigger(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_outrigger")).args(args).output().expect("it runs")
}

/// Starts packing and kills it once `far_enough`.
fn kill_when(out: &Path, far_enough: impl Fn(&Path) -> bool) {
    let mut work = out.as_os_str().to_owned();
    work.push(".work");
    let mut child = pack(out).spawn().expect("it starts");
    let started = Instant::now();
    while !far_enough(Path::new(&work)) {
        assert!(
            child.try_wait().expect("it can be asked").is_none(),
            "it ended before it was killed"
        );
        assert!(started.elapsed() < Duration::from_secs(120), "it does not get there");
        std::thread::sleep(Duration::from_millis(2));
    }
    child.kill().expect("it runs");
    child.wait().expect("it died");
    assert!(!out.exists(), "an unfinished pack is not at its place");
}

#[test]
fn a_killed_pack_goes_on_and_ends_as_if_nothing_had_been() {
    let dir = tempfile::tempdir().expect("a directory");
    let (whole, killed) = (dir.path().join("whole.gguf"), dir.path().join("killed.gguf"));
    assert!(pack(&whole).status().expect("it runs").success());

    let kept = |work: &Path, kind: &str| {
        let names = std::fs::read_dir(work).into_iter().flatten().flatten().map(|e| e.file_name());
        names.filter(|name| name.to_string_lossy().starts_with(kind)).count()
    };
    kill_when(&killed, |work| kept(work, "curves-") >= 2);
    kill_when(&killed, |work| kept(work, "layer-") >= 1);
    assert!(pack(&killed).status().expect("it runs").success());
    assert!(
        std::fs::read(&whole).expect("it is there") == std::fs::read(&killed).expect("it is there")
    );
    assert_eq!(
        std::fs::read_dir(dir.path()).expect("it is there").count(),
        2,
        "nothing is left behind"
    );
}

#[test]
fn a_damaged_pack_is_refused_by_name() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("pack.gguf");
    assert!(pack(&path).status().expect("it runs").success());
    let good = std::fs::read(&path).expect("it is there");
    let name = path.to_str().expect("plain characters");

    let inspected = outrigger(&["inspect", name]);
    let text = String::from_utf8_lossy(&inspected.stdout).into_owned();
    assert!(inspected.status.success() && text.contains("a pack of 20%"), "{text}");
    let demo = repository("models/demo.gguf");
    let demo = demo.to_str().expect("plain characters");
    let token_bytes = |file| {
        let found = outrigger(&["inspect", file, "--json"]).stdout;
        let found: serde_json::Value = serde_json::from_slice(&found).expect("JSON");
        found["weight_bytes_per_token"].as_u64().expect("a number")
    };
    assert!(3 * token_bytes(name) < 2 * token_bytes(demo), "a pack's own experts count");

    let alone = ["eval", "-m", name, "--token-ids", "1,2,3", "--offline-after", "1"];
    let error = String::from_utf8_lossy(&outrigger(&alone).stderr).into_owned();
    assert!(
        error.contains("pack.gguf: found a pack") && error.contains("--against-full"),
        "{error}"
    );

    std::fs::write(&path, &good[..good.len() - 5000]).expect("room");
    let cut = outrigger(&["inspect", name]);
    let error = String::from_utf8_lossy(&cut.stderr).into_owned();
    assert!(
        !cut.status.success() && error.contains("pack.gguf") && error.contains("ffn_"),
        "{error}"
    );

    let at = good.windows(4).position(|bytes| bytes == b".vq2").expect("a coded matrix");
    let mut renamed = good.clone();
    renamed[at + 3] = b'5';
    std::fs::write(&path, &renamed).expect("room");
    let renamed = outrigger(&["run", "-m", name, "-p", "x", "-n", "1"]);
    let error = String::from_utf8_lossy(&renamed.stderr).into_owned();
    assert!(!renamed.status.success() && error.contains("no such tensor"), "{error}");
}

#[test]
fn other_peoples_files_are_left_alone() {
    let dir = tempfile::tempdir().expect("a directory");
    let out = dir.path().join("out.gguf");
    let notes = dir.path().join("out.gguf.work/notes");
    std::fs::create_dir(notes.parent().expect("a directory")).expect("room");
    std::fs::write(&notes, "important").expect("room");
    let refused = pack(&out).stderr(Stdio::piped()).output().expect("it runs");
    let error = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(!refused.status.success() && error.contains("notes: found a file that no"), "{error}");
    assert_eq!(std::fs::read_to_string(&notes).expect("it is there"), "important");

    let refused = pack(&notes).stderr(Stdio::piped()).output().expect("it runs");
    let error = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(!refused.status.success() && error.contains("notes: output: found a file"), "{error}");
    assert_eq!(std::fs::read_to_string(&notes).expect("it is there"), "important");
}

#[test]
fn no_directory_is_made_for_a_pack() {
    let dir = tempfile::tempdir().expect("a directory");
    let nowhere = dir.path().join("nowhere");
    let refused = pack(&nowhere.join("out.gguf")).stderr(Stdio::piped()).output().expect("it runs");
    let error = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(!refused.status.success() && error.contains("nowhere/out.gguf"), "{error}");
    assert!(!nowhere.exists());
}
