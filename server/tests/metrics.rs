//! The metrics count what happened.

mod common;

use common::*;
use outrigger_experts::Model;
use outrigger_proto::v1::{DescribeRequest, Encoding};
use outrigger_server::{ServerConfig, serve_metrics};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};

#[tokio::test(flavor = "multi_thread")]
async fn calls_rows_bytes_and_time_are_counted() {
    let model = Model::open(&demo()).unwrap();
    let mut server = start(config(&demo())).await;
    let mut bytes = 0;
    for (layer, rows) in [(1, 3), (1, 2), (4, 5)] {
        let request = Job::random(&model, layer, rows, 4, 1).request(&model, Encoding::Q80);
        bytes += request.activations.len();
        server.client.forward(request).await.unwrap();
    }
    assert_eq!(server.metric("rows_total"), 10.0);
    assert_eq!(server.metric("expert_rows_total"), 40.0);
    assert_eq!(server.metric("batches_total"), 3.0);
    assert_eq!(server.metric("queue_rows"), 0.0);
    assert_eq!(server.metric(r#"requests_total{code="OK",tenant=""}"#), 3.0);
    assert_eq!(server.metric(r#"latency_seconds_count{layer="1"}"#), 2.0);
    assert_eq!(server.metric(r#"latency_seconds_count{layer="4"}"#), 1.0);
    assert!(server.metric(r#"latency_seconds_sum{layer="4"}"#) > 0.0);
    assert!(server.metric("compute_seconds_total") > 0.0);
    assert!(server.metric("received_bytes_total") > bytes as f64);
    // An f32 a value.
    assert!(server.metric("sent_bytes_total") > (10 * model.spec.n_embd * 4) as f64);
    assert_eq!(server.metric("connections"), 1.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_refused_is_counted_by_its_status() {
    let model = Model::open(&demo()).unwrap();
    let mut server = start(ServerConfig { layers: Some(0..=1), ..config(&demo()) }).await;
    let request = Job::random(&model, 3, 1, 4, 1).request(&model, Encoding::Q80);
    server.client.forward(request.clone()).await.unwrap_err();
    server.client.forward(request).await.unwrap_err();
    assert_eq!(server.metric(r#"requests_total{code="INVALID_ARGUMENT",tenant=""}"#), 2.0);
    assert_eq!(server.metric("rows_total"), 0.0);
    assert_eq!(server.metric(r#"latency_seconds_count{layer="3"}"#), 0.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn experts_that_cannot_be_read_are_counted() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("model.gguf");
    write_model(&path, outrigger_experts::GgmlType::Q8_0);
    let model = Model::open(&path).unwrap();
    let mut server = start(config(&path)).await;
    let file = std::fs::File::options().write(true).open(&path).unwrap();
    file.set_len(file.metadata().unwrap().len() - 100).unwrap();
    let mut job = Job::random(&model, 0, 1, 1, 1);
    job.groups = (0..4).map(|expert| (expert, vec![(0, 1.0)])).collect();
    server.client.forward(job.request(&model, Encoding::Q80)).await.unwrap();
    assert_eq!(server.metric("unreadable_experts_total"), 1.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn prometheus_finds_them_and_nothing_else() {
    let mut server = start(config(&demo())).await;
    server.client.describe(DescribeRequest {}).await.unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let metrics = server.metrics.clone();
    tokio::spawn(serve_metrics(listener, move || metrics.text()));
    let ask = async |request: &str| {
        let mut stream = TcpStream::connect(address).await.unwrap();
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        answer
    };
    let answer = ask("GET /metrics HTTP/1.1\r\nhost: localhost\r\n\r\n").await;
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    assert!(answer.contains("content-type: application/openmetrics-text"), "{answer}");
    assert!(answer.contains("\noutrigger_server_connections 1\n"), "{answer}");
    assert!(answer.trim_end().ends_with("# EOF"), "{answer}");
    for request in ["GET / HTTP/1.1\r\n\r\n", "POST /metrics HTTP/1.1\r\n\r\n"] {
        let answer = ask(request).await;
        assert!(answer.starts_with("HTTP/1.1 404"), "{answer}");
    }
}
