//! The command: what it prints, what it refuses, how it stops.

use std::io::{BufRead as _, BufReader, Read as _};
use std::net::SocketAddr;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use serde_json::json;

use crate::common::{LONG, Stream, completion, demo, post_head};

fn command(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_outrigger"));
    command.arg("serve").arg("-m").arg(demo()).args(["-t", "1"]).args(args);
    command.env_remove("OUTRIGGER_API_KEY").env_remove("OUTRIGGER_SERVERS");
    command
}

fn refused(mut command: Command) -> String {
    let Output { status, stderr, .. } = command.output().unwrap();
    let stderr = String::from_utf8(stderr).unwrap();
    assert_eq!(status.code(), Some(1), "{stderr}");
    stderr
}

/// A process that does not outlive its test.
struct Running {
    child: Child,
    address: SocketAddr,
}

impl Running {
    fn start(mut command: Command) -> Running {
        let pipes = command.stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = pipes.spawn().unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.as_mut().unwrap()).read_line(&mut line).unwrap();
        let address = line.trim().strip_prefix("listening on http://").expect(&line);
        Running { address: address.parse().unwrap(), child }
    }

    fn terminate(&self) {
        let kill = format!("kill -TERM {}", self.child.id());
        assert!(Command::new("sh").args(["-c", &kill]).status().unwrap().success());
    }

    /// The exit code, and what was said on standard error.
    fn ended(&mut self) -> (Option<i32>, String) {
        let give_up = Instant::now() + LONG;
        let status = loop {
            match self.child.try_wait().unwrap() {
                Some(status) => break status,
                None if Instant::now() > give_up => panic!("it is still there"),
                None => std::thread::sleep(Duration::from_millis(10)),
            }
        };
        let mut log = String::new();
        self.child.stderr.take().unwrap().read_to_string(&mut log).unwrap();
        (status.code(), log)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn sigterm_finishes_what_is_in_hand() {
    let mut served = Running::start(command(&["--listen", "127.0.0.1:0"]));
    let fields = json!({ "max_tokens": 300, "stream": true, "temperature": 0 });
    let body = completion("Once upon a time", fields).to_string();
    let head = post_head("/v1/completions", &[], body.len());
    let mut stream = Stream::open(served.address, &head, body.as_bytes()).await;
    stream.event().await.expect("a token");
    served.terminate();
    let (mut last, mut events) = (None, 1);
    while let Some(event) = stream.event().await {
        last = Some(event);
        events += 1;
    }
    assert!(events > 100, "{events} events");
    assert_eq!(last.unwrap()["choices"][0]["finish_reason"], "length");
    let (code, log) = served.ended();
    assert_eq!(code, Some(0), "{log}");
    assert!(std::net::TcpStream::connect(served.address).is_err());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_signal_waits_for_nothing() {
    let mut served = Running::start(command(&["--listen", "127.0.0.1:0"]));
    // It waits for a body, which does not come.
    let head = post_head("/v1/completions", &["Expect: 100-continue"], 100);
    let waiting = Stream::open(served.address, &head, b"").await;
    assert_eq!(waiting.status, 100);
    served.terminate();
    // Both signals at once would be one.
    while std::net::TcpStream::connect(served.address).is_ok() {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    served.terminate();
    let (code, log) = served.ended();
    assert_eq!(code, Some(130), "{log}");
    assert!(log.contains("second signal"), "{log}");
}

#[test]
fn defaults_for_requests_are_checked_at_start() {
    let stderr = refused(command(&["--top-p", "2"]));
    assert!(stderr.contains("top-p") && stderr.contains("found 2"), "{stderr}");
}

#[test]
fn beyond_loopback_it_wants_a_key_or_insecure() {
    let stderr = refused(command(&["--listen", "0.0.0.0:0"]));
    assert!(stderr.contains("--api-key-file") && stderr.contains("--insecure"), "{stderr}");

    let insecure = command(&["--listen", "0.0.0.0:0", "--insecure"]);
    let mut keyed = command(&["--listen", "0.0.0.0:0"]);
    keyed.env("OUTRIGGER_API_KEY", "0123456789abcdef");
    for (command, how) in [(insecure, "without a key"), (keyed, "with the key")] {
        let mut served = Running::start(command);
        served.terminate();
        let (code, log) = served.ended();
        assert_eq!(code, Some(0), "{log}");
        assert!(log.contains("open to other machines") && log.contains(how), "{log}");
    }
}

#[test]
fn a_bad_key_is_named_and_not_shown() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("key");
    std::fs::write(&path, "too-short\n").unwrap();
    let stderr = refused(command(&["--api-key-file", path.to_str().unwrap()]));
    assert!(stderr.contains(path.to_str().unwrap()) && stderr.contains("16"), "{stderr}");
    assert!(!stderr.contains("too-short"), "{stderr}");
}
