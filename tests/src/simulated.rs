//! The real client and the real server on a simulated network, in virtual time (turmoil).

use std::net::{IpAddr, Ipv4Addr};
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};
use std::time::Duration;

use hyper_util::rt::TokioIo;
use outrigger::{Budget, Dial, Elsewhere, Engine, EngineConfig, Token};
use outrigger_server::{Compute, ExpertServer, ServerConfig};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tonic::transport::Uri;
use tonic::transport::server::{Connected, TcpConnectInfo};
use turmoil::net::{TcpListener, TcpStream};
use turmoil::{Builder, Sim};

use crate::{fixtures, greedy};

const PORT: u16 = 7070;
/// What a token may wait for the server, in simulated time.
pub const DEADLINE: Duration = Duration::from_millis(300);
/// Simulated time between two tokens: computing costs none.
pub const PACE: Duration = Duration::from_millis(50);

/// Something that happens to the network or to the server.
#[derive(Clone, Debug)]
pub enum Event {
    /// No message passes between the two.
    Partition,
    /// Messages pass again.
    Repair,
    /// Every message takes this long.
    Latency(Duration),
    /// The server dies without a word.
    Crash,
    /// A server starts where the last one died, with this model.
    Restart(PathBuf),
}

/// One token as the device saw it.
#[derive(Clone, Debug)]
pub struct Observed {
    /// Simulated time at which it was asked for.
    pub asked: Duration,
    /// The token.
    pub token: Token,
}

/// What a run left.
pub struct Outcome {
    /// Every token, in order.
    pub tokens: Vec<Observed>,
    /// Logits after the last token, once everything was settled; empty if it could not be.
    pub settled_logits: Vec<f32>,
    /// All token ids, the prompt included.
    pub ids: Vec<u32>,
}

/// Generates for `length` of simulated time with the demo model, a cache of a quarter and the other experts on the
/// server, while `script` happens.
pub fn run(seed: u64, length: Duration, script: &[(Duration, Event)]) -> Outcome {
    println!("seed {seed}");
    let mut sim = Builder::new()
        .rng_seed(seed)
        .simulation_duration(length * 3 + Duration::from_secs(60))
        .tick_duration(Duration::from_millis(1))
        .min_message_latency(Duration::from_millis(1))
        .max_message_latency(Duration::from_millis(4))
        .tcp_capacity(4096)
        .build();
    let model = Arc::new(Mutex::new(fixtures::demo_model()));
    let served = model.clone();
    sim.host("server", move || serve(served.clone()));
    let outcome = Arc::new(Mutex::new(None));
    let result = outcome.clone();
    sim.client("device", async move {
        *result.lock().expect("not poisoned") = Some(generate(length).await?);
        Ok(())
    });
    let mut script = script.iter();
    let mut next = script.next();
    loop {
        while let Some((_, event)) = next.filter(|(at, _)| sim.elapsed() >= *at) {
            apply(&mut sim, event, &model);
            next = script.next();
        }
        if sim.step().expect("the simulation runs") {
            break;
        }
    }
    let mut outcome = outcome.lock().expect("not poisoned");
    outcome.take().expect("the device finished")
}

fn apply(sim: &mut Sim<'_>, event: &Event, model: &Mutex<PathBuf>) {
    match event {
        Event::Partition => sim.partition("device", "server"),
        Event::Repair => sim.repair("device", "server"),
        Event::Latency(latency) => sim.set_link_latency("device", "server", *latency),
        Event::Crash => sim.crash("server"),
        Event::Restart(with) => {
            *model.lock().expect("not poisoned") = with.clone();
            sim.bounce("server");
        }
    }
}

async fn generate(length: Duration) -> turmoil::Result<Outcome> {
    let mut config = EngineConfig::new(fixtures::demo_model());
    config.servers = vec![format!("http://server:{PORT}")];
    config.expert_cache = Budget::Fraction(0.25);
    config.elsewhere = Elsewhere::Absent;
    config.deadline = DEADLINE;
    config.threads = 1;
    config.dial = Dial::new(|endpoint| endpoint.connect_with_connector_lazy(Connector));
    let engine = Engine::open(config).await?;
    let mut session = greedy(&engine);
    session.push_text("It was a dark and stormy night")?;
    let mut tokens = Vec::new();
    while turmoil::elapsed() < length {
        let asked = turmoil::elapsed();
        tokens.push(Observed { asked, token: session.step().await? });
        tokio::time::sleep(PACE).await;
    }
    let mut settled_logits = Vec::new();
    if engine.wait_connected(Duration::from_secs(5)).await {
        session.settle().await?;
        // The last token is pending: nothing was computed for it yet.
        if session.settled() + 1 == session.len() {
            settled_logits = session.logits().to_vec();
        }
    }
    let ids = session.tokens().collect();
    Ok(Outcome { tokens, settled_logits, ids })
}

async fn serve(model: Arc<Mutex<PathBuf>>) -> turmoil::Result {
    let model = model.lock().expect("not poisoned").clone();
    let config =
        ServerConfig { model, threads: 1, compute: Compute::Inline, ..ServerConfig::default() };
    let server = ExpertServer::open(config)?;
    let listener = TcpListener::bind((IpAddr::from(Ipv4Addr::UNSPECIFIED), PORT)).await?;
    let (send, receive) = tokio::sync::mpsc::channel(16);
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            if send.send(Ok::<_, std::io::Error>(Accepted(stream))).await.is_err() {
                return;
            }
        }
    });
    let incoming = tokio_stream::wrappers::ReceiverStream::new(receive);
    server.serve(incoming, None, std::future::pending()).await?;
    Ok(())
}

/// Connects through the simulated network.
#[derive(Clone)]
struct Connector;

impl tower::Service<Uri> for Connector {
    type Response = TokioIo<TcpStream>;
    type Error = std::io::Error;
    type Future = Pin<Box<dyn Future<Output = std::io::Result<TokioIo<TcpStream>>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, uri: Uri) -> Self::Future {
        Box::pin(async move {
            let host = uri.host().unwrap_or_default().to_owned();
            let stream =
                TcpStream::connect((host.as_str(), uri.port_u16().unwrap_or(PORT))).await?;
            Ok(TokioIo::new(stream))
        })
    }
}

/// A simulated connection, as tonic wants it.
struct Accepted(TcpStream);

impl Connected for Accepted {
    type ConnectInfo = TcpConnectInfo;

    fn connect_info(&self) -> TcpConnectInfo {
        TcpConnectInfo {
            local_addr: self.0.local_addr().ok(),
            remote_addr: self.0.peer_addr().ok(),
        }
    }
}

impl AsyncRead for Accepted {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.0).poll_read(cx, buf)
    }
}

impl AsyncWrite for Accepted {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<std::io::Result<usize>> {
        Pin::new(&mut self.0).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.0).poll_shutdown(cx)
    }
}
