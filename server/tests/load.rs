//! The load generator, whose counts are what the server did, and more load than a server can bear.

mod common;

use std::process::{Command, Output, Stdio};

use common::*;
use outrigger_experts::Model;
use outrigger_proto::v1::Encoding;
use outrigger_server::{ServerConfig, serve_metrics};
use serde_json::Value;
use tokio::net::TcpListener;
use tokio::task::JoinSet;
use tokio::time::{Duration, sleep};
use tonic::Code;

/// `load`, with what it prints going to `stdout`.
async fn run(url: &str, args: &[&str], stdout: Stdio) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_outrigger-server"));
    command.args(["load", "--json", "--seconds", "1", "--warm-up", "0", "--server", url]);
    command.args(args).env("OUTRIGGER_LISTEN", "127.0.0.1:1").env_remove("RUST_LOG");
    command.stdout(stdout).stderr(Stdio::piped());
    let output = tokio::task::spawn_blocking(move || command.spawn()?.wait_with_output());
    output.await.unwrap().unwrap()
}

/// The steps that `load` prints.
async fn load(url: &str, args: &[&str]) -> Vec<Value> {
    let Output { status, stdout, stderr } = run(url, args, Stdio::piped()).await;
    assert!(status.success(), "{}", String::from_utf8_lossy(&stderr));
    let lines = String::from_utf8(stdout).unwrap();
    lines.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_step_for_each_number_of_devices() {
    let part = ServerConfig { layers: Some(1..=4), experts: Some(3..=9), ..config(&demo()) };
    let server = start(part).await;
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let at = listener.local_addr().unwrap().to_string();
    let metrics = server.metrics.clone();
    tokio::spawn(serve_metrics(listener, move || metrics.text()));
    let steps = load(&server.url, &["--devices", "1,5", "-k", "4", "--metrics", &at]).await;
    assert_eq!(steps.iter().map(|step| &step["devices"]).collect::<Vec<_>>(), [1, 5]);
    for step in steps {
        // Only what the server holds is asked for, so that nothing is refused and everything counts.
        assert_eq!((&step["shed"], &step["errors"]), (&0.into(), &0.into()), "{step}");
        let number = |field: &str| step[field].as_f64().unwrap();
        assert!(number("rows_per_s") >= 4.0 && number("rows_per_s") % 4.0 == 0.0, "{step}");
        assert!(0.0 < number("p50_ms") && number("p50_ms") <= number("p99_ms"), "{step}");
        // Of this process, which has the server in it: more than a page, less than the machine.
        let machine = outrigger_experts::memory_limit().unwrap_or(u64::MAX) as f64;
        assert!((4096.0..machine).contains(&number("server_memory")), "{step}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_queue_shows_as_shed_and_not_as_errors() {
    let server = start(ServerConfig { queue_rows: 1, threads: 1, ..config(&demo()) }).await;
    let steps = load(&server.url, &["--devices", "64", "-k", "32"]).await;
    assert!(steps[0]["shed"].as_u64().unwrap() > 0, "{}", steps[0]);
    assert_eq!(steps[0]["errors"], 0);
    assert!(steps[0]["rows_per_s"].as_f64().unwrap() > 0.0, "{}", steps[0]);
}

#[tokio::test(flavor = "multi_thread")]
async fn it_ends_quietly_when_nobody_reads_on_and_says_when_it_cannot_write() {
    let server = start(config(&demo())).await;
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let args = ["--devices", "1,1"];
    let Output { status, stderr, .. } = run(&server.url, &args, writer.into()).await;
    assert!(status.success() && stderr.is_empty(), "{}", String::from_utf8_lossy(&stderr));
    if let Ok(full) = std::fs::File::options().write(true).open("/dev/full") {
        let Output { status, stderr, .. } = run(&server.url, &args, full.into()).await;
        let stderr = String::from_utf8(stderr).unwrap();
        assert_eq!(status.code(), Some(1), "{stderr}");
        assert!(stderr.contains("cannot write to standard output"), "{stderr}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn it_fails_where_nothing_is_answered() {
    let fails = async |server: &Running, args: &[&str]| {
        let Output { status, stderr, .. } = run(&server.url, args, Stdio::piped()).await;
        let stderr = String::from_utf8(stderr).unwrap();
        assert_eq!(status.code(), Some(1), "{stderr}");
        stderr
    };
    // One tenant, in debt for an hour.
    let (token, model) = ("heart-0123456789abcdef", Model::open(&demo()).unwrap());
    let tenants = tenants(&format!("heart {token} 1"));
    let mut server = start(ServerConfig { tenants: Some(tenants), ..config(&demo()) }).await;
    let job = Job::random(&model, 0, 512, 8, 1).request(&model, Encoding::Q80);
    let mut request = tonic::Request::new(job);
    request.metadata_mut().insert("authorization", format!("Bearer {token}").parse().unwrap());
    server.client.forward(request).await.unwrap();
    let stderr = fails(&server, &[]).await;
    assert!(stderr.contains(&format!("{} does not answer", server.url)), "{stderr}");
    assert!(stderr.contains("bearer token") && !stderr.contains("metadata"), "{stderr}");

    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(&file, token).unwrap();
    let args = ["--devices", "2", "--token-file", file.path().to_str().unwrap()];
    let stderr = fails(&server, &args).await;
    assert!(stderr.contains("no call was answered"), "{stderr}");
}

#[tokio::test(flavor = "multi_thread")]
async fn more_experts_than_the_server_holds_of_a_layer_are_refused() {
    let server = start(ServerConfig { experts: Some(3..=9), ..config(&demo()) }).await;
    let Output { status, stderr, .. } = run(&server.url, &["-k", "8"], Stdio::piped()).await;
    let stderr = String::from_utf8(stderr).unwrap();
    assert_eq!(status.code(), Some(1), "{stderr}");
    assert!(stderr.contains("-k 8: expected at most 7"), "{stderr}");
}

#[tokio::test(flavor = "multi_thread")]
async fn experts_that_were_not_run_are_no_rows() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("model.gguf");
    write_model(&path, outrigger_experts::GgmlType::Q8_0);
    let server = start(config(&path)).await;
    // The last of four experts is at the end of the file.
    let file = std::fs::File::options().write(true).open(&path).unwrap();
    file.set_len(file.metadata().unwrap().len() - 100).unwrap();
    let step = load(&server.url, &["--devices", "1", "-k", "4"]).await.remove(0);
    let rows = step["rows_per_s"].as_f64().unwrap();
    assert!(rows > 0.0 && rows == 3.0 * step["errors"].as_f64().unwrap(), "{step}");
}

#[tokio::test(flavor = "multi_thread")]
async fn it_fails_where_a_step_was_not_answered() {
    // What the first call takes is half a minute of the quota.
    let tenants = Some(tenants("heart heart-0123456789abcdef 1"));
    let server = start(ServerConfig { tenants, ..config(&demo()) }).await;
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(&file, "heart-0123456789abcdef").unwrap();
    let args = ["--devices", "1,2", "-k", "32", "--token-file", file.path().to_str().unwrap()];
    let Output { status, stderr, .. } = run(&server.url, &args, Stdio::piped()).await;
    let stderr = String::from_utf8(stderr).unwrap();
    assert_eq!(status.code(), Some(1), "{stderr}");
    assert!(stderr.contains("no call was answered with 2 devices"), "{stderr}");
}

/// Ten times as many rows as may wait, at once: each call is answered, rightly or with a time to return, and nothing of
/// the burst is left.
#[tokio::test(flavor = "multi_thread")]
async fn after_a_burst_the_queue_is_empty_and_answers_are_right() {
    let model = Model::open(&demo()).unwrap();
    let limits = ServerConfig { queue_rows: 64, max_streams: 256, ..config(&demo()) };
    let mut server = start(ServerConfig { threads: 1, ..limits }).await;
    // Something to compute until the burst is there, and the burst.
    let job = |seed: u64| match seed {
        0 => Job::random(&model, 0, 512, 32, seed),
        _ => Job::random(&model, seed as u32 % 6, 4, 8, seed),
    };
    let mut requests: Vec<_> =
        (0..161).map(|seed| (seed, job(seed).request(&model, Encoding::Q80))).collect();
    let burst = requests.split_off(1);
    let long = requests[0].1.activations.len() as f64;
    let mut calls = JoinSet::new();
    let mut send = |(seed, request)| {
        let mut client = server.client.clone();
        calls.spawn(async move { (seed, client.forward(request).await) });
    };
    requests.into_iter().for_each(&mut send);
    while server.metric("received_bytes_total") < long {
        sleep(Duration::from_millis(1)).await;
    }
    burst.into_iter().for_each(send);
    let (mut answered, mut shed, mut rows) = (0, 0, 0);
    while let Some(call) = calls.join_next().await {
        match call.unwrap() {
            (seed, Ok(answer)) => {
                assert_eq!(sums(&model, answer.get_ref()), job(seed).local(&model, |_| true));
                answered += 1;
                rows += if seed == 0 { 512 } else { 4 };
            }
            // It may be the long one, if one of the burst overtakes it.
            (_, Err(status)) => {
                assert_eq!(status.code(), Code::Unavailable, "{status}");
                assert!(status.metadata().contains_key("grpc-retry-pushback-ms"));
                shed += 1;
            }
        }
    }
    assert!(shed > 0 && answered > 0, "{shed} sent away, {answered} answered");
    assert_eq!(server.metric("queue_rows"), 0.0);
    let requests =
        |code: &str| server.metric(&format!("requests_total{{code=\"{code}\",tenant=\"\"}}"));
    assert_eq!((requests("OK"), requests("UNAVAILABLE")), (f64::from(answered), f64::from(shed)));
    assert_eq!(server.metric("rows_total"), f64::from(rows));
    let one = server.client.forward(job(7).request(&model, Encoding::Q80)).await.unwrap();
    assert_eq!(sums(&model, one.get_ref()), job(7).local(&model, |_| true));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tenant_gets_its_quota_and_no_more() {
    let token = "heart-0123456789abcdef";
    let tenants = tenants(&format!("heart {token} 100"));
    let server = start(ServerConfig { tenants: Some(tenants), ..config(&demo()) }).await;
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("token");
    std::fs::write(&file, format!("{token}\n")).unwrap();
    let args = ["--devices", "4", "-k", "4", "--token-file", file.to_str().unwrap()];
    let step = load(&server.url, &args).await.remove(0);
    assert!(step["shed"].as_u64().unwrap() > 0, "{step}");
    assert_eq!(step["errors"], 0, "{step}");
    // What was in the bucket, what flowed in meanwhile, and what each device may have borrowed.
    let rows = step["rows_per_s"].as_f64().unwrap();
    assert!((4.0..=220.0).contains(&rows), "{step}");
}
