//! Clients that go away, fall silent, never finish, or send what is compressed.

mod common;

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::task::{Context, Poll};

use bytes::Bytes;
use common::*;
use hyper::body::Frame;
use outrigger_experts::Model;
use outrigger_proto::v1::experts_client::ExpertsClient;
use outrigger_proto::v1::{DescribeRequest, Encoding};
use outrigger_server::{Compute, ExpertServer, ServerConfig};
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};
use tokio::task::JoinSet;
use tokio::time::{Duration, Instant, sleep};
use tokio_stream::StreamExt;
use tonic::Status;
use tonic::body::Body;
use tonic::codegen::http;
use tonic::transport::{Channel, Endpoint};
use tower::{Service, ServiceExt};

#[tokio::test(flavor = "multi_thread")]
async fn work_of_a_client_that_vanished_is_not_done() {
    let model = Model::open(&demo()).unwrap();
    let mut server = start(ServerConfig { threads: 1, ..config(&demo()) }).await;
    // Layers of their own, so that none shares a batch.
    let requests: Vec<_> = (0..6)
        .map(|layer| Job::random(&model, layer, 512, 32, 1).request(&model, Encoding::Q80))
        .collect();
    let own = Endpoint::from_shared(server.url.clone()).unwrap().connect().await.unwrap();
    let mut calls = JoinSet::new();
    for request in requests {
        let mut client = ExpertsClient::new(own.clone());
        calls.spawn(async move { client.forward(request).await });
    }
    drop(own);
    while server.metric("queue_rows") == 0.0 {
        sleep(Duration::from_millis(1)).await;
    }
    calls.shutdown().await;
    while server.metric("connections") > 1.0 {
        sleep(Duration::from_millis(1)).await;
    }
    // Whoever comes next waits for what was being computed, and no longer.
    let one = Job::random(&model, 0, 1, 4, 2);
    server.client.forward(one.request(&model, Encoding::Q80)).await.unwrap();
    assert!(server.metric("rows_total") <= 3.0 * 512.0 + 1.0, "{}", server.metric("rows_total"));
    assert_eq!(server.metric("queue_rows"), 0.0);
    // A call that nobody waits for any more counts too.
    while server.metric(r#"requests_total{code="CANCELLED",tenant=""}"#) == 0.0 {
        sleep(Duration::from_millis(1)).await;
    }
}

/// A server in virtual time, and one connection to it over which nothing passes while `cut` is set.
async fn over_a_cable(cut: Arc<AtomicBool>) -> (Arc<outrigger_server::Metrics>, Channel) {
    let server = ExpertServer::open(ServerConfig { compute: Compute::Inline, ..config(&demo()) });
    let server = server.unwrap();
    let metrics = server.metrics();
    let (near, from_near) = duplex(64 << 10);
    let (far, from_far) = duplex(64 << 10);
    let incoming = tokio_stream::once(Ok::<_, std::io::Error>(far)).chain(tokio_stream::pending());
    tokio::spawn(server.serve(incoming, None, std::future::pending()));
    let (near_read, near_write) = tokio::io::split(from_near);
    let (far_read, far_write) = tokio::io::split(from_far);
    for (mut read, mut write) in [(near_read, far_write), (far_read, near_write)] {
        let cut = cut.clone();
        tokio::spawn(async move {
            let mut bytes = [0; 4096];
            while let Ok(count @ 1..) = read.read(&mut bytes).await {
                if !cut.load(Ordering::Relaxed) && write.write_all(&bytes[..count]).await.is_err() {
                    return;
                }
            }
        });
    }
    let near = std::sync::Mutex::new(Some(hyper_util::rt::TokioIo::new(near)));
    let connect = tower::service_fn(move |_| {
        let near = near.lock().unwrap().take().expect("connects once");
        async move { Ok::<_, std::convert::Infallible>(near) }
    });
    let endpoint = Endpoint::from_static("http://server.test:7070");
    (metrics, endpoint.connect_with_connector(connect).await.unwrap())
}

#[tokio::test(start_paused = true)]
async fn a_peer_that_is_cut_off_is_given_up_by_keepalive() {
    let cut = Arc::new(AtomicBool::new(false));
    let (metrics, channel) = over_a_cable(cut.clone()).await;
    let mut client = ExpertsClient::new(channel);
    client.describe(DescribeRequest {}).await.unwrap();
    sleep(Duration::from_secs(120)).await;
    assert_eq!(metric(&metrics, "connections"), 1.0, "silent, but it answers pings");
    cut.store(true, Ordering::Relaxed);
    sleep(Duration::from_secs(40)).await;
    assert_eq!(metric(&metrics, "connections"), 0.0);
    assert_eq!(metric(&metrics, "connections_idle_closed_total"), 0.0);
}

#[tokio::test(start_paused = true)]
async fn a_listener_that_fails_is_tried_again_after_a_pause() {
    let server = ExpertServer::open(ServerConfig { compute: Compute::Inline, ..config(&demo()) });
    let tries = Arc::new(AtomicUsize::new(0));
    let fails = {
        let tries = tries.clone();
        move |_| {
            tries.fetch_add(1, Ordering::Relaxed);
            Err::<DuplexStream, _>(std::io::Error::other("no file descriptor is left"))
        }
    };
    let incoming = tokio_stream::iter(0..1000).map(fails).chain(tokio_stream::pending());
    tokio::spawn(server.unwrap().serve(incoming, None, std::future::pending()));
    sleep(Duration::from_millis(9500)).await;
    assert_eq!(tries.load(Ordering::Relaxed), 10);
}

/// A gRPC call with this body.
fn call(body: Body) -> http::Request<Body> {
    let request = http::Request::post("http://server.test/outrigger.v1.Experts/Forward");
    let request = request.header("content-type", "application/grpc").header("te", "trailers");
    request.body(body).unwrap()
}

fn code(response: &http::Response<Body>) -> &str {
    response.headers().get("grpc-status").unwrap().to_str().unwrap()
}

/// The head of a message of 100 bytes, and then nothing.
struct Endless(Option<Bytes>);

impl hyper::body::Body for Endless {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        self.0.take().map_or(Poll::Pending, |bytes| Poll::Ready(Some(Ok(Frame::data(bytes)))))
    }
}

#[tokio::test(start_paused = true)]
async fn a_body_that_never_ends_is_cut_off_in_time() {
    let (_, mut channel) = over_a_cable(Arc::default()).await;
    let body = Body::new(Endless(Some(Bytes::from_static(&[0, 0, 0, 0, 100]))));
    let started = Instant::now();
    let response = channel.ready().await.unwrap().call(call(body)).await.unwrap();
    assert_ne!(code(&response), "0");
    let limit = ServerConfig::default().request_timeout;
    assert!(started.elapsed() <= limit + Duration::from_secs(1), "{:?}", started.elapsed());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_message_that_is_compressed_is_not_unpacked() {
    let server = start(config(&demo())).await;
    let mut channel = server.channel.clone();
    let mut request = call(Body::new("\x01\0\0\0\x04bomb".to_owned()));
    request.headers_mut().insert("grpc-encoding", "gzip".parse().unwrap());
    let response = channel.ready().await.unwrap().call(request).await.unwrap();
    assert_eq!(code(&response), "12", "UNIMPLEMENTED");
}
