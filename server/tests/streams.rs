//! What one connection may hold: so many requests at a time, and answers for as long as it takes a peer to read them.

mod common;

use std::future::pending;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll};
use std::time::Instant;

use common::*;
use hyper_util::rt::TokioIo;
use outrigger_experts::Model;
use outrigger_proto::v1::experts_client::ExpertsClient;
use outrigger_proto::v1::{DescribeRequest, Encoding, ForwardRequest};
use outrigger_server::ServerConfig;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, ReadBuf};
use tokio::net::{TcpSocket, TcpStream};
use tokio::task::JoinSet;
use tokio::time::{Duration, sleep, timeout};
use tonic::Code;
use tonic::body::Body;
use tonic::codegen::http;
use tonic::transport::Endpoint;
use tower::{Service as _, ServiceExt as _};

/// A connection of which nothing is read any more once it is deaf.
struct Deaf {
    io: TcpStream,
    deaf: Arc<AtomicBool>,
}

impl AsyncRead for Deaf {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        match self.deaf.load(Ordering::Relaxed) {
            true => Poll::Pending,
            false => Pin::new(&mut self.io).poll_read(cx, buffer),
        }
    }
}

impl AsyncWrite for Deaf {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
}

/// A connection on which little fits into the socket.
async fn connect(server: &Running) -> TcpStream {
    let address: SocketAddr = server.url.strip_prefix("http://").unwrap().parse().unwrap();
    let socket = TcpSocket::new_v4().unwrap();
    socket.set_recv_buffer_size(4 << 10).unwrap();
    socket.connect(address).await.unwrap()
}

/// A peer that asks and asks, and reads nothing: neither of the socket once it is deaf, nor of an answer more than fits
/// into `window`. It is there as long as the set.
async fn ask_and_read_nothing(server: &Running, deaf: bool, window: u32) -> JoinSet<()> {
    let io = connect(server).await;
    let closed_ears = Arc::new(AtomicBool::new(false));
    let near = std::sync::Mutex::new(Some(Deaf { io, deaf: closed_ears.clone() }));
    let connect = tower::service_fn(move |_| {
        let near = near.lock().unwrap().take().ok_or(io::ErrorKind::ConnectionRefused);
        async move { Ok::<_, io::Error>(TokioIo::new(near?)) }
    });
    let endpoint = Endpoint::from_static("http://server.test:7070")
        .initial_stream_window_size(window)
        .initial_connection_window_size(1 << 30);
    let channel = endpoint.connect_with_connector(connect).await.unwrap();
    // By its answer the window for what goes up is there too.
    let refused = ExpertsClient::new(channel.clone()).forward(ForwardRequest::default()).await;
    assert_eq!(refused.unwrap_err().code(), Code::InvalidArgument);
    closed_ears.store(deaf, Ordering::Relaxed);
    let model = Model::open(&demo()).unwrap();
    // Answers of half a MiB each: together more than the sockets hold.
    let request = Job::random(&model, 0, 512, 1, 1).request(&model, Encoding::Q80);
    let mut calls = JoinSet::new();
    for _ in 0..64 {
        let channel = channel.clone();
        // Holds each answer as it comes, without a look at its body.
        let hold = tower::service_fn(move |request: http::Request<Body>| {
            let mut channel = channel.clone();
            async move {
                let _answer = channel.ready().await?.call(request).await?;
                pending::<Result<http::Response<Body>, tonic::transport::Error>>().await
            }
        });
        let request = request.clone();
        calls.spawn(async move {
            let _ = ExpertsClient::new(hold).forward(request).await;
            pending().await
        });
    }
    calls
}

#[tokio::test(flavor = "multi_thread")]
async fn who_reads_no_answer_is_given_up() {
    let answer_timeout = Duration::from_secs(2);
    for (deaf, window) in [(true, 64 << 20), (false, 0), (false, 1000)] {
        let config = ServerConfig { answer_timeout, max_streams: 32, ..config(&demo()) };
        let mut server = start(config).await;
        server.client.describe(DescribeRequest {}).await.unwrap();
        let started = Instant::now();
        let _calls = ask_and_read_nothing(&server, deaf, window).await;
        until_alone(&server).await;
        assert!(started.elapsed() >= answer_timeout, "deaf {deaf}, window {window}");
        assert_eq!(server.metric("connections_unread_closed_total"), 1.0);
        assert_eq!(server.metric("connections_idle_closed_total"), 0.0);
        // No more is computed than what one connection may hold, and others are served.
        assert!(server.metric("rows_total") <= 32.0 * 512.0, "{}", server.metric("rows_total"));
        server.client.describe(DescribeRequest {}).await.unwrap();
    }
}

/// Waits until all connections are closed but the one of the server's own client.
async fn until_alone(server: &Running) {
    let closed = async {
        while server.metric("connections") > 1.0 {
            sleep(Duration::from_millis(5)).await;
        }
    };
    timeout(LONG, closed).await.expect("it is given up");
}

/// A frame of HTTP/2.
#[derive(Debug)]
struct Frame {
    kind: u8,
    stream: u32,
    payload: Vec<u8>,
}

const HEADERS: u8 = 1;
const RST_STREAM: u8 = 3;
const SETTINGS: u8 = 4;
const PING: u8 = 6;

/// A peer that writes HTTP/2 by hand, and heeds no limit.
struct Rude(TcpStream);

impl Rude {
    async fn connect(server: &Running) -> Rude {
        let mut io = connect(server).await;
        io.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").await.unwrap();
        let mut peer = Rude(io);
        peer.send(SETTINGS, 0, 0, &[]).await;
        peer
    }

    async fn send(&mut self, kind: u8, flags: u8, stream: u32, payload: &[u8]) {
        let mut frame = (payload.len() as u32).to_be_bytes()[1..].to_vec();
        frame.extend([kind, flags]);
        frame.extend(stream.to_be_bytes());
        frame.extend(payload);
        // One that was given up finds it out when it reads.
        let _ = self.0.write_all(&frame).await;
    }

    /// Begins a call, and leaves it there.
    async fn begin(&mut self, stream: u32) {
        const END_HEADERS: u8 = 4;
        let mut block = Vec::new();
        for (name, value) in [
            (":method", "POST"),
            (":scheme", "http"),
            (":path", "/outrigger.v1.Experts/Forward"),
            (":authority", "server.test"),
            ("content-type", "application/grpc"),
            ("te", "trailers"),
        ] {
            // A literal that is not indexed, by a new name.
            block.push(0);
            for text in [name, value] {
                block.push(text.len() as u8);
                block.extend(text.bytes());
            }
        }
        self.send(HEADERS, END_HEADERS, stream, &block).await;
    }

    /// The next frame of one of these kinds.
    async fn next(&mut self, kinds: &[u8]) -> Frame {
        loop {
            let mut head = [0; 9];
            timeout(LONG, self.0.read_exact(&mut head)).await.expect("a frame").unwrap();
            let length = u32::from_be_bytes([0, head[0], head[1], head[2]]);
            let stream = u32::from_be_bytes(head[5..].try_into().unwrap());
            let mut payload = vec![0; length as usize];
            self.0.read_exact(&mut payload).await.unwrap();
            if kinds.contains(&head[3]) {
                return Frame { kind: head[3], stream, payload };
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn who_reads_no_sign_of_life_is_given_up() {
    let config = ServerConfig {
        answer_timeout: Duration::from_secs(2),
        first_request_timeout: LONG * 2,
        ..config(&demo())
    };
    let mut server = start(config).await;
    server.client.describe(DescribeRequest {}).await.unwrap();
    let mut peer = Rude::connect(&server).await;
    while server.metric("connections") < 2.0 {
        sleep(Duration::from_millis(1)).await;
    }
    let pinging = tokio::spawn(async move {
        loop {
            peer.send(PING, 0, 0, &[0; 8]).await;
        }
    });
    until_alone(&server).await;
    assert_eq!(server.metric("connections_unread_closed_total"), 1.0);
    pinging.abort();
}

#[tokio::test(flavor = "multi_thread")]
async fn streams_on_top_are_refused_and_a_place_that_is_left_is_given_again() {
    let mut server = start(ServerConfig { max_streams: 2, ..config(&demo()) }).await;
    let mut peer = Rude::connect(&server).await;
    let settings = peer.next(&[SETTINGS]).await.payload;
    let limit = settings.chunks(6).find(|setting| setting[..2] == [0, 3]).expect("a limit is told");
    assert_eq!(limit[2..], [0, 0, 0, 2]);

    for stream in [1, 3, 5] {
        peer.begin(stream).await;
    }
    let refused = peer.next(&[RST_STREAM, HEADERS]).await;
    const REFUSED_STREAM: [u8; 4] = [0, 0, 0, 7];
    assert_eq!((refused.kind, refused.stream), (RST_STREAM, 5));
    assert_eq!(refused.payload, REFUSED_STREAM);

    const CANCEL: [u8; 4] = [0, 0, 0, 8];
    peer.send(RST_STREAM, 0, 1, &CANCEL).await;
    peer.begin(7).await;
    // An empty message, which is answered with a status.
    const DATA: u8 = 0;
    peer.send(DATA, 1, 7, &[0; 5]).await;
    let answer = peer.next(&[RST_STREAM, HEADERS]).await;
    assert_eq!((answer.kind, answer.stream), (HEADERS, 7));
    server.client.describe(DescribeRequest {}).await.unwrap();
}
