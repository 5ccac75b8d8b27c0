//! Who may come in, for how long, and how much of the server each may have.

mod common;

use std::convert::Infallible;
use std::io;
use std::os::unix::fs::symlink;
use std::sync::Mutex;
use std::time::Duration;

use common::*;
use hyper_util::rt::TokioIo;
use outrigger_experts::Model;
use outrigger_proto::v1::experts_client::ExpertsClient;
use outrigger_proto::v1::{DescribeRequest, Encoding};
use outrigger_server::{Compute, ExpertServer, ServerConfig, Tenants};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream, duplex};
use tokio::net::TcpStream;
use tokio::time::{Instant, sleep, timeout};
use tokio_stream::StreamExt as _;
use tonic::transport::Endpoint;
use tonic::{Code, Request};
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_client::HealthClient;
use tonic_reflection::pb::v1::server_reflection_client::ServerReflectionClient;

const HEART: &str = "heart-0123456789abcdef";
const LUNG: &str = "lung-0123456789abcdefg";

fn with_token<T>(message: T, token: &str) -> Request<T> {
    let mut request = Request::new(message);
    request.metadata_mut().insert("authorization", format!("Bearer {token}").parse().unwrap());
    request
}

async fn code(server: &mut Running, token: &str) -> Code {
    let described = server.client.describe(with_token(DescribeRequest {}, token)).await;
    described.map_or_else(|status| status.code(), |_| Code::Ok)
}

/// Asks until the answer is this.
async fn until(server: &mut Running, token: &str, expected: Code) {
    let asking = async {
        while code(server, token).await != expected {
            sleep(Duration::from_millis(20)).await;
        }
    };
    timeout(LONG, asking).await.expect("it comes to that");
}

fn with_tenants() -> ServerConfig {
    let tenants = tenants(&format!("heart {HEART}\nlung {LUNG} 10"));
    ServerConfig { tenants: Some(tenants), ..config(&demo()) }
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_token_only_health_is_told() {
    let mut server = start(with_tenants()).await;
    let nobody = server.client.describe(DescribeRequest {}).await.unwrap_err();
    assert_eq!(nobody.code(), Code::Unauthenticated);
    let wrong = code(&mut server, "heart-0123456789abcdeX").await;
    assert_eq!(wrong, Code::Unauthenticated);
    assert_eq!(code(&mut server, HEART).await, Code::Ok);

    let mut reflection = ServerReflectionClient::new(server.channel.clone());
    let refused = reflection.server_reflection_info(tokio_stream::empty()).await.unwrap_err();
    assert_eq!(refused.code(), Code::Unauthenticated);
    let mut health = HealthClient::new(server.channel.clone());
    health.check(HealthCheckRequest::default()).await.unwrap();
    assert_eq!(server.metric(r#"requests_total{code="UNAUTHENTICATED",tenant=""}"#), 3.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_greedy_tenant_is_sent_away_and_the_other_is_not() {
    let model = Model::open(&demo()).unwrap();
    let mut server = start(with_tenants()).await;
    let request = Job::random(&model, 0, 50, 4, 1).request(&model, Encoding::Q80);
    server.client.forward(with_token(request.clone(), LUNG)).await.unwrap();
    // 200 rows times experts, of 10 a second.
    let status = server.client.forward(with_token(request.clone(), LUNG)).await.unwrap_err();
    assert_eq!(status.code(), Code::ResourceExhausted);
    assert!(status.metadata().contains_key("grpc-retry-pushback-ms"));
    for _ in 0..3 {
        server.client.forward(with_token(request.clone(), HEART)).await.unwrap();
    }
    assert_eq!(server.metric(r#"requests_total{code="RESOURCE_EXHAUSTED",tenant="lung"}"#), 1.0);
    assert_eq!(server.metric(r#"requests_total{code="OK",tenant="heart"}"#), 3.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn tokens_change_with_their_file() {
    let directory = tempfile::tempdir().unwrap();
    // As Kubernetes mounts a secret: the file is a link through a link, which is replaced by a rename.
    let put = |version: &str, text: &str| {
        let at = |name: &str| directory.path().join(name);
        std::fs::create_dir(at(version)).unwrap();
        std::fs::write(at(version).join("tokens"), text).unwrap();
        symlink(version, at("..data_tmp")).unwrap();
        std::fs::rename(at("..data_tmp"), at("..data")).unwrap();
    };
    put("1", &format!("heart {HEART}\n"));
    let file = directory.path().join("tokens");
    symlink("..data/tokens", &file).unwrap();
    let tenants = Some(Tenants::read(&file).unwrap());
    let mut server = start(ServerConfig { tenants, ..config(&demo()) }).await;
    assert_eq!(code(&mut server, HEART).await, Code::Ok);
    assert_eq!(code(&mut server, LUNG).await, Code::Unauthenticated);

    put("2", &format!("lung {LUNG}\n"));
    until(&mut server, LUNG, Code::Ok).await;
    assert_eq!(
        code(&mut server, HEART).await,
        Code::Unauthenticated,
        "on a connection that it had"
    );

    for broken in ["lung short\n", ""] {
        std::fs::write(directory.path().join("2/tokens"), broken).unwrap();
        let noticed = async {
            while server.metric("tokens_stale") == 0.0 {
                sleep(Duration::from_millis(20)).await;
            }
        };
        timeout(LONG, noticed).await.expect("it is noticed");
        assert_eq!(code(&mut server, LUNG).await, Code::Ok);
        assert_eq!(code(&mut server, HEART).await, Code::Unauthenticated);

        std::fs::write(directory.path().join("2/tokens"), format!("lung {LUNG}\nheart {HEART}"))
            .unwrap();
        until(&mut server, HEART, Code::Ok).await;
        assert_eq!(server.metric("tokens_stale"), 0.0);
        std::fs::write(directory.path().join("2/tokens"), format!("lung {LUNG}\n")).unwrap();
        until(&mut server, HEART, Code::Unauthenticated).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn connections_on_top_are_closed_and_a_place_that_is_left_is_given_again() {
    let mut server = start(ServerConfig { max_connections: 2, ..config(&demo()) }).await;
    server.client.describe(DescribeRequest {}).await.unwrap();
    let address = server.url.strip_prefix("http://").unwrap();
    let second = TcpStream::connect(address).await.unwrap();
    while server.metric("connections") < 2.0 {
        sleep(Duration::from_millis(1)).await;
    }
    let mut third = TcpStream::connect(address).await.unwrap();
    assert_eq!(timeout(LONG, third.read(&mut [0])).await.unwrap().unwrap(), 0);
    assert_eq!(server.metric("connections_refused_total"), 1.0);
    drop(second);
    while server.metric("connections") > 1.0 {
        sleep(Duration::from_millis(1)).await;
    }
    let channel = Endpoint::from_shared(server.url.clone()).unwrap().connect().await.unwrap();
    ExpertsClient::new(channel).describe(DescribeRequest {}).await.unwrap();
    server.client.describe(DescribeRequest {}).await.unwrap();
}

/// A server on one connection, in virtual time.
fn serve_one(far: DuplexStream) -> std::sync::Arc<outrigger_server::Metrics> {
    let server = ExpertServer::open(ServerConfig {
        compute: Compute::Inline,
        threads: 1,
        first_request_timeout: Duration::from_secs(10),
        idle_timeout: Duration::from_secs(600),
        ..config(&demo())
    });
    let server = server.unwrap();
    let metrics = server.metrics();
    let incoming = tokio_stream::once(Ok::<_, io::Error>(far)).chain(tokio_stream::pending());
    tokio::spawn(server.serve(incoming, None, std::future::pending()));
    metrics
}

#[tokio::test(start_paused = true)]
async fn whoever_makes_no_request_is_cut_off_however_busy_it_looks() {
    let preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0";
    for slow in [false, true] {
        let (near, far) = duplex(64 << 10);
        let metrics = serve_one(far);
        let started = Instant::now();
        let (mut reader, mut writer) = tokio::io::split(near);
        let writing = tokio::spawn(async move {
            for byte in preface {
                if slow {
                    sleep(Duration::from_secs(1)).await;
                }
                if writer.write_all(&[*byte]).await.is_err() {
                    return;
                }
            }
            std::future::pending().await
        });
        reader.read_to_end(&mut Vec::new()).await.unwrap();
        assert_eq!(started.elapsed().as_secs(), 10, "slow: {slow}");
        assert_eq!(metric(&metrics, "connections_idle_closed_total"), 1.0);
        writing.abort();
    }
}

#[tokio::test(start_paused = true)]
async fn each_request_puts_the_end_off() {
    let (near, far) = duplex(64 << 10);
    let metrics = serve_one(far);
    let near = Mutex::new(Some(TokioIo::new(near)));
    let connect = tower::service_fn(move |_| {
        let near = near.lock().unwrap().take().expect("connects once");
        async move { Ok::<_, Infallible>(near) }
    });
    let endpoint = Endpoint::from_static("http://server.test:7070");
    let channel = endpoint.connect_with_connector(connect).await.unwrap();
    let mut client = ExpertsClient::new(channel);
    for _ in 0..3 {
        client.describe(DescribeRequest {}).await.unwrap();
        sleep(Duration::from_secs(590)).await;
        assert_eq!(metric(&metrics, "connections"), 1.0);
    }
    sleep(Duration::from_secs(20)).await;
    assert_eq!(metric(&metrics, "connections"), 0.0);
    assert_eq!(metric(&metrics, "connections_idle_closed_total"), 1.0);
}
