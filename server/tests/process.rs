//! The binary: what it prints, what it refuses, how it stops.

mod common;

use std::io::{BufRead, BufReader, Write};
use std::net::TcpStream;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use common::{Job, LONG, demo};
use outrigger_proto::v1::experts_client::ExpertsClient;
use outrigger_proto::v1::{DescribeRequest, Encoding};
use tonic::transport::Endpoint;

fn command(model: &Path, args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_outrigger-server"));
    command.arg("-m").arg(model).args(args).env_remove("RUST_LOG").env_remove("OUTRIGGER_LISTEN");
    command
}

/// Runs a server that must not start.
fn refused(model: &Path, args: &[&str]) -> String {
    let Output { status, stderr, .. } = command(model, args).output().unwrap();
    let stderr = String::from_utf8(stderr).unwrap();
    assert_eq!(status.code(), Some(1), "{stderr}");
    stderr
}

/// A server process, killed when this is dropped.
struct Running {
    child: Child,
    /// The line that it printed when it was ready.
    line: String,
    /// The lines of its log.
    log: Receiver<String>,
}

impl Running {
    fn start(args: &[&str]) -> Running {
        Running::start_with(args, "info")
    }

    fn start_with(args: &[&str], level: &str) -> Running {
        let mut child = command(&demo(), args)
            .args(["--listen", "127.0.0.1:0", "-t", "1"])
            .env("RUST_LOG", level)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.as_mut().unwrap()).read_line(&mut line).unwrap();
        let (lines, log) = channel();
        let stderr = BufReader::new(child.stderr.take().unwrap());
        std::thread::spawn(move || stderr.lines().try_for_each(|line| lines.send(line.unwrap())));
        Running { child, line: line.trim().to_owned(), log }
    }

    /// The next line of the log with all of these words.
    fn logs(&self, words: &[&str]) -> String {
        loop {
            let line = self.log.recv_timeout(LONG).unwrap_or_else(|_| panic!("{words:?}"));
            if words.iter().all(|word| line.contains(word)) {
                return line;
            }
        }
    }

    fn signal(&self, signal: &str) {
        sh(&format!("kill -{signal} {}", self.child.id()));
    }

    /// Sends a signal; the exit code, and what is left of the log.
    fn stop(mut self, signal: &str) -> (Option<i32>, String) {
        self.signal(signal);
        let give_up = Instant::now() + LONG;
        let status = loop {
            match self.child.try_wait().unwrap() {
                Some(status) => break status,
                None if Instant::now() > give_up => panic!("still there after SIG{signal}"),
                None => std::thread::sleep(Duration::from_millis(10)),
            }
        };
        let log: Vec<String> = self.log.iter().collect();
        (status.code(), log.join("\n"))
    }
}

fn sh(command: &str) {
    assert!(Command::new("sh").args(["-c", command]).status().unwrap().success(), "{command}");
}

impl Drop for Running {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn it_says_where_it_listens_and_stops_on_sigterm() {
    let server = Running::start(&["--layers", "0-2", "--experts", "4"]);
    let address = server.line.strip_prefix("listening on ").expect("an address");
    let endpoint = Endpoint::from_shared(format!("http://{address}")).unwrap();
    let mut client = ExpertsClient::new(endpoint.connect().await.unwrap());
    let held = client.describe(DescribeRequest {}).await.unwrap().into_inner().held[0];
    assert_eq!((held.first_layer, held.last_layer), (0, 2));
    assert_eq!((held.first_expert, held.last_expert), (4, 4));
    // The client stays connected, and does not hold the server up.
    let (code, log) = server.stop("TERM");
    assert_eq!(code, Some(0), "{log}");
    assert!(log.contains("draining") && log.contains("stopped"), "{log}");
    assert!(!log.contains("work was left"), "{log}");
}

#[test]
fn with_json_every_line_is_json() {
    let server = Running::start(&["--log", "json"]);
    let ready: serde_json::Value = serde_json::from_str(&server.line).unwrap();
    assert!(ready["listening"].as_str().unwrap().starts_with("127.0.0.1:"));
    assert_eq!(ready["fingerprint"].as_str().unwrap().len(), 64);
    let (code, log) = server.stop("INT");
    assert_eq!(code, Some(0));
    assert!(log.lines().count() >= 2, "{log}");
    for line in log.lines() {
        serde_json::from_str::<serde_json::Value>(line).expect(line);
    }

    let stderr = refused(&demo(), &["--log", "json", "--layers", "3-9"]);
    let error: serde_json::Value = serde_json::from_str(&stderr).unwrap();
    assert_eq!(error["level"], "ERROR");
    assert_eq!(error["fields"]["message"], "layers 3-9: the model has layers 0-5");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_log_of_a_batch_names_the_requests_of_devices() {
    let model = outrigger_experts::Model::open(&demo()).unwrap();
    let server = Running::start_with(&["--log", "json"], "info,outrigger_server=debug");
    let ready: serde_json::Value = serde_json::from_str(&server.line).unwrap();
    let address = ready["listening"].as_str().unwrap();
    let endpoint = Endpoint::from_shared(format!("http://{address}")).unwrap();
    let mut client = ExpertsClient::new(endpoint.connect().await.unwrap());
    let job = Job::random(&model, 3, 2, 4, 1).request(&model, Encoding::Q80);
    let mut request = tonic::Request::new(job);
    request.metadata_mut().insert("x-request-id", "t417-l3".parse().unwrap());
    client.forward(request).await.unwrap();
    let (_, log) = server.stop("TERM");
    let lines = log.lines().map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap());
    let batch = lines.map(|line| line["fields"].clone()).find(|line| line["message"] == "batch");
    let batch = batch.expect(&log);
    assert_eq!((&batch["layer"], &batch["rows"]), (&3.into(), &2.into()));
    assert_eq!(batch["requests"], r#"["t417-l3"]"#);
    assert!(batch["took_us"].is_u64(), "{batch}");
}

#[test]
fn a_bad_file_of_tokens_is_named_with_its_line() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("tokens");
    std::fs::write(&path, "heart 0123456789abcdef\nlung short\n").unwrap();
    let stderr = refused(&demo(), &["--token-file", path.to_str().unwrap()]);
    assert!(stderr.contains(path.to_str().unwrap()) && stderr.contains("line 2"), "{stderr}");
    assert!(!stderr.contains("0123456789abcdef"), "{stderr}");
}

#[test]
fn a_file_of_tokens_that_goes_bad_is_named_in_the_log() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("tokens");
    std::fs::write(&path, "heart 0123456789abcdef\n").unwrap();
    let server = Running::start(&["--token-file", path.to_str().unwrap()]);
    std::fs::write(&path, "heart 0123456789abcdef\nlung short\n").unwrap();
    let line = server.logs(&["ERROR", path.to_str().unwrap(), "line 2"]);
    assert!(!line.contains("0123456789abcdef"), "{line}");
    // Another mistake is news too.
    std::fs::write(&path, "heart 0123456789abcdef many\n").unwrap();
    server.logs(&["ERROR", path.to_str().unwrap(), "line 1: a quota"]);
}

#[test]
fn at_sighup_files_are_looked_at_and_nothing_ends() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("tokens");
    std::fs::write(&path, "heart 0123456789abcdef\n").unwrap();
    let server = Running::start(&["--token-file", path.to_str().unwrap()]);
    std::fs::write(&path, "lung 0123456789abcdef\n").unwrap();
    server.logs(&["INFO", path.to_str().unwrap(), "read again"]);
    server.signal("HUP");
    server.logs(&["INFO", path.to_str().unwrap(), "as it was"]);
    let (code, log) = server.stop("TERM");
    assert_eq!(code, Some(0), "{log}");
    assert!(log.contains("stopped"), "{log}");
    // Nor where there is nothing to look at.
    let server = Running::start(&[]);
    server.signal("HUP");
    assert_eq!(server.stop("TERM").0, Some(0));
}

/// Whoever opens a pipe that nobody writes to waits for ever.
#[test]
fn a_pipe_in_the_place_of_a_file_holds_nothing_up() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("tokens");
    let file = path.to_str().unwrap();
    std::fs::write(&path, "heart 0123456789abcdef\n").unwrap();
    let server = Running::start(&["--token-file", file]);
    sh(&format!("rm {file} && mkfifo {file}"));
    server.logs(&["ERROR", file, "expected a regular file"]);
    let (code, log) = server.stop("TERM");
    assert_eq!(code, Some(0), "{log}");
    let stderr = refused(&demo(), &["--token-file", file]);
    assert!(stderr.contains(file) && stderr.contains("expected a regular file"), "{stderr}");
}

#[test]
fn a_certificate_that_has_expired_is_in_the_log() {
    let key = rcgen::KeyPair::generate().unwrap();
    let mut params = rcgen::CertificateParams::new(vec!["localhost".to_owned()]).unwrap();
    params.not_after = rcgen::date_time_ymd(2020, 1, 1);
    let pem = params.self_signed(&key).unwrap().pem() + &key.serialize_pem();
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(&file, pem).unwrap();
    let path = file.path().to_str().unwrap();
    let server = Running::start(&["--tls-cert", path, "--tls-key", path]);
    server.logs(&["WARN", path, "expired on Jan  1"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn who_is_refused_is_in_the_log_with_its_address_and_without_its_token() {
    let key = rcgen::KeyPair::generate().unwrap();
    let params = rcgen::CertificateParams::new(vec!["localhost".to_owned()]).unwrap();
    let pem = params.self_signed(&key).unwrap().pem() + &key.serialize_pem();
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(&file, pem).unwrap();
    let path = file.path().to_str().unwrap();
    let server = Running::start(&["--tls-cert", path, "--tls-key", path]);
    let mut peer = TcpStream::connect(server.line.strip_prefix("listening on ").unwrap()).unwrap();
    peer.write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap();
    let address = format!("peer={}", peer.local_addr().unwrap());
    server.logs(&["INFO", "no TLS with a peer", &address]);

    std::fs::write(&file, "heart 0123456789abcdef\n").unwrap();
    let server = Running::start(&["--token-file", path]);
    let address = server.line.strip_prefix("listening on ").unwrap();
    let endpoint = Endpoint::from_shared(format!("http://{address}")).unwrap();
    let mut client = ExpertsClient::new(endpoint.connect().await.unwrap());
    let mut request = tonic::Request::new(DescribeRequest {});
    request.metadata_mut().insert("authorization", "Bearer lung-456789abcdef".parse().unwrap());
    client.describe(request).await.unwrap_err();
    let line = server.logs(&["INFO", "no good token", "peer=127.0.0.1:"]);
    assert!(!line.contains("456789abcdef"), "{line}");
}

#[test]
fn beyond_loopback_it_wants_tls_or_insecure() {
    for address in ["0.0.0.0:0", "[::]:0", "192.0.2.1:7070"] {
        let stderr = refused(&demo(), &["--listen", address]);
        assert!(stderr.contains(address), "{stderr}");
        assert!(stderr.contains("--tls-cert") && stderr.contains("--insecure"), "{stderr}");
    }
}

#[test]
fn a_bad_file_is_named() {
    let directory = tempfile::tempdir().unwrap();
    let missing = directory.path().join("missing.gguf");
    let stderr = refused(&missing, &[]);
    assert!(stderr.contains(missing.to_str().unwrap()), "{stderr}");

    let garbage = directory.path().join("garbage.gguf");
    std::fs::write(&garbage, "not a model").unwrap();
    let stderr = refused(&garbage, &[]);
    assert!(stderr.contains(garbage.to_str().unwrap()), "{stderr}");

    let stderr = refused(&demo(), &["--layers", "3-9"]);
    assert!(stderr.contains("layers 3-9: the model has layers 0-5"), "{stderr}");
}

#[test]
fn variables_say_what_flags_do_not_and_empty_ones_say_nothing() {
    const NAMES: [&str; 10] = [
        "MODEL",
        "LISTEN",
        "THREADS",
        "EXPERT_CACHE",
        "TLS_CERT",
        "TLS_KEY",
        "TLS_CLIENT_CA",
        "TOKENS",
        "METRICS",
        "HEALTH",
    ];
    let serve = |values: [&str; 10]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_outrigger-server"));
        let named = NAMES.map(|name| format!("OUTRIGGER_{name}")).into_iter().zip(values);
        command.arg("serve").envs(named).env_remove("RUST_LOG");
        command
    };
    let model = demo();
    let model = model.to_str().unwrap();
    for (values, refused) in [
        ([model, "0.0.0.0:0", "1", "50%", "", "", "", "", "", ""], "0.0.0.0:0 can be reached"),
        ([model, "", "", "", "/no/cert", "/no/key", "", "", "", ""], "/no/cert"),
        ([model, "", "", "", "", "", "", "/no/tokens", "", ""], "/no/tokens"),
        (["/no/model", "", "", "", "", "", "", "", "", ""], "/no/model"),
    ] {
        let Output { status, stderr, .. } = serve(values).output().unwrap();
        let stderr = String::from_utf8(stderr).unwrap();
        assert_eq!(status.code(), Some(1), "{stderr}");
        assert!(stderr.contains(refused), "{stderr}");
    }
    let Output { status, stderr, .. } = serve([""; 10]).output().unwrap();
    let stderr = String::from_utf8(stderr).unwrap();
    assert_eq!(status.code(), Some(2), "{stderr}");
    assert!(stderr.contains("--model"), "{stderr}");
}

#[test]
fn a_log_filter_that_is_none_is_refused() {
    let output = command(&demo(), &["--listen", "127.0.0.1:0"]).env("RUST_LOG", "a=b=c").output();
    let Output { status, stderr, .. } = output.unwrap();
    let stderr = String::from_utf8(stderr).unwrap();
    assert_eq!(status.code(), Some(1), "{stderr}");
    assert!(stderr.contains("RUST_LOG"), "{stderr}");
}

#[test]
fn tls_files_that_cannot_be_read_are_named() {
    let stderr = refused(&demo(), &["--tls-cert", "/no/cert.pem", "--tls-key", "/no/key.pem"]);
    assert!(stderr.contains("/no/cert.pem"), "{stderr}");
}
