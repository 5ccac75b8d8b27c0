//! Little disk, little memory, and two of us: the command line in an unkind world.
//!
//! A small disk is a tmpfs and a small memory is a control group, which take privileges. Where there are none, a test says
//! on standard error that it was skipped, whatever captures its output.
#![cfg(target_os = "linux")]

use std::io::{BufRead as _, BufReader, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

fn demo() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/demo.gguf")
}

/// Less than the model's file and what the process needs besides.
const LIMIT: u64 = 20 << 20;

fn outrigger() -> Command {
    Command::new(env!("CARGO_BIN_EXE_outrigger"))
}

fn pack(out: &Path) -> Command {
    let mut command = outrigger();
    command.args(["pack", "--budget", "20%", "--calibration-tokens", "2048", "-t", "2", "-m"]);
    command.arg(demo()).arg("-o").arg(out).stdout(Stdio::null());
    command
}

fn error_of(output: &Output) -> String {
    assert!(!output.status.success(), "it is refused");
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// Past what captures the output of a test that passes.
fn skipped(test: &str, why: &str) {
    let _ = writeln!(std::io::stderr(), "SKIPPED {test}: {why}");
}

/// A file system in memory, unmounted in the end.
struct SmallDisk(tempfile::TempDir);

impl SmallDisk {
    fn mount(size: &str) -> Option<SmallDisk> {
        let dir = tempfile::tempdir().expect("a directory");
        let mut mount = Command::new("mount");
        mount.args(["-t", "tmpfs", "-o", &format!("size={size}"), "none"]).arg(dir.path());
        let mounted = mount.stderr(Stdio::null()).status().is_ok_and(|status| status.success());
        mounted.then(|| SmallDisk(dir))
    }

    fn path(&self) -> &Path {
        self.0.path()
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(self.path()).status();
    }
}

#[test]
fn a_full_disk_costs_the_new_pack_and_not_the_old() {
    let Some(disk) = SmallDisk::mount("1m") else {
        return skipped("a_full_disk_costs_the_new_pack_and_not_the_old", "cannot mount a tmpfs");
    };
    let out = disk.path().join("pack.gguf");
    std::fs::write(&out, b"GGUF that was there").expect("there is room for that");
    let error = error_of(&pack(&out).output().expect("it runs"));
    assert!(error.contains("pack.gguf") && error.contains("No space left"), "{error}");
    assert_eq!(std::fs::read(&out).expect("it is there"), b"GGUF that was there");

    let mut run = outrigger();
    run.args(["run", "-p", "Once", "-n", "1", "--expert-cache", "25%", "--standins", "20%"]);
    run.args(["--elsewhere", "absent", "-m"]).arg(demo()).env("XDG_CACHE_HOME", disk.path());
    let error = error_of(&run.output().expect("it runs"));
    assert!(error.contains("outrigger") && error.contains("No space left"), "{error}");
}

#[test]
fn two_processes_do_not_make_the_same_pack() {
    let dir = tempfile::tempdir().expect("a directory");
    let out = dir.path().join("pack.gguf");
    let mut first = Running(pack(&out).stderr(Stdio::null()).spawn().expect("it starts"));
    let curves = dir.path().join("pack.gguf.work/curves-0");
    let started = Instant::now();
    while !curves.exists() {
        assert!(started.elapsed() < Duration::from_secs(120), "it does not get there");
        std::thread::sleep(Duration::from_millis(2));
    }
    let error = error_of(&pack(&out).output().expect("it runs"));
    assert!(error.contains("pack.gguf: another process is packing to it"), "{error}");
    assert!(first.0.wait().expect("it ends").success(), "the first one goes on");
    let inspected = outrigger().arg("inspect").arg(&out).output().expect("it runs");
    assert!(inspected.status.success());
}

/// A process that does not outlive its test.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A control group of its own, removed in the end.
struct SmallMemory(PathBuf);

impl SmallMemory {
    fn of(bytes: u64, test: &str) -> Option<SmallMemory> {
        let name = format!("outrigger-{}-{test}", std::process::id());
        for (root, limit) in
            [("/sys/fs/cgroup/memory", "memory.limit_in_bytes"), ("/sys/fs/cgroup", "memory.max")]
        {
            let group = SmallMemory(Path::new(root).join(&name));
            let made = std::fs::create_dir(&group.0);
            if made.is_ok() && group.set(limit, bytes) {
                return Some(group);
            }
        }
        None
    }

    /// Whether there is such a limit, which now is `bytes`.
    fn set(&self, limit: &str, bytes: u64) -> bool {
        let file = self.0.join(limit);
        file.exists() && std::fs::write(file, bytes.to_string()).is_ok()
    }

    /// A command in it.
    fn inside(&self, command: &Command) -> Command {
        let procs = self.0.join("cgroup.procs");
        let mut inside = Command::new("sh");
        inside.args(["-c", "echo $$ > \"$0\" && exec \"$@\""]).arg(procs);
        inside.arg(command.get_program()).args(command.get_args());
        inside
    }
}

impl SmallMemory {
    /// Whether something had to leave.
    fn was_short(&self) -> bool {
        let read = |name: &str| std::fs::read_to_string(self.0.join(name)).ok();
        let old = read("memory.failcnt").is_some_and(|count| count.trim() != "0");
        let met = |events: String| events.lines().any(|l| l.starts_with("max ") && l != "max 0");
        old || read("memory.events").is_some_and(met)
    }
}

impl Drop for SmallMemory {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir(&self.0);
    }
}

/// The experts do not all fit: what the cache may hold is cut to the limit, which is never met, and what is said does
/// not change.
#[test]
fn a_small_memory_changes_nothing_that_is_said() {
    const NAME: &str = "a_small_memory_changes_nothing_that_is_said";
    let Some(memory) = SmallMemory::of(LIMIT, NAME) else {
        return skipped(NAME, "cannot make a control group");
    };
    let dir = tempfile::tempdir().expect("a directory");
    let model = dir.path().join("demo.gguf");
    std::fs::copy(demo(), &model).expect("there is room");
    let mut run = outrigger();
    run.args(["run", "-p", "Once upon a time", "-n", "24", "--temp", "0", "-t", "2"]);
    run.args(["--expert-cache", "100%", "-m"]).arg(&model);
    let free = run.output().expect("it runs");
    assert!(free.status.success(), "{}", String::from_utf8_lossy(&free.stderr));
    // Pages that others have read are not counted: the copy must not be in memory.
    let mut evict = Command::new("dd");
    evict.arg(format!("of={}", model.display()));
    evict.args(["oflag=nocache", "conv=notrunc,fdatasync", "count=0", "status=none"]);
    assert!(evict.status().expect("it runs").success());
    let tight = memory.inside(&run).output().expect("it runs");
    assert!(tight.status.success(), "{}", String::from_utf8_lossy(&tight.stderr));
    assert_eq!(tight.stdout, free.stdout);
    assert!(!memory.was_short(), "the limit was met");
}

/// Two turns of a chat. `between` them may wait until the log says something.
fn chat(command: &mut Command, between: impl FnOnce(&mut dyn FnMut(&str) -> bool)) -> Output {
    let pipes = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut chat = pipes.spawn().expect("it starts");
    let mut say = |text: &str| {
        let stdin = chat.stdin.as_mut().expect("it is piped");
        stdin.write_all(text.as_bytes()).expect("it listens");
    };
    say("Once upon a time\n");
    let log = BufReader::new(chat.stderr.take().expect("it is piped"));
    let mut log = log.lines().map_while(Result::ok);
    let mut says = |what: &str| log.any(|line| line.contains(what));
    // What a turn ends with.
    assert!(says("tokens"), "the first turn ends");
    between(&mut says);
    say("And then\n");
    drop(chat.stdin.take());
    assert!(says("tokens"), "the second turn ends");
    chat.wait_with_output().expect("it ends")
}

#[test]
fn a_limit_that_comes_down_shrinks_the_cache() {
    const NAME: &str = "a_limit_that_comes_down_shrinks_the_cache";
    let Some(memory) = SmallMemory::of(1 << 30, NAME) else {
        return skipped(NAME, "cannot make a control group");
    };
    let mut command = outrigger();
    command.args(["chat", "-n", "24", "--temp", "0", "-t", "2", "--expert-cache", "100%", "-m"]);
    command.arg(demo());
    let free = chat(&mut command, |_| ());
    let tight = chat(&mut memory.inside(&command), |says| {
        let limits = ["memory.limit_in_bytes", "memory.max"];
        assert!(limits.iter().any(|limit| memory.set(limit, 64 << 20)));
        assert!(says("the expert cache is cut"), "it is noticed");
    });
    assert!(free.status.success() && tight.status.success());
    assert_eq!(tight.stdout, free.stdout);
}
