//! A device and a server on a simulated network, in virtual time.
//!
//! Everything runs on one thread of one tokio runtime whose clock stands still while anything computes and jumps to the
//! next event when nothing does. The connection is the only part that is not real.

use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use hyper_util::rt::TokioIo;
use outrigger_server::{Compute, ExpertServer, ServerConfig};
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep_until};
use tokio_stream::wrappers::UnboundedReceiverStream;
use tonic::transport::Uri;

use super::medium::{Medium, Timeline, Way};
use super::stream::{Killer, Shared, Stream, connection, lock};
use crate::config::Dial;

/// What happens to the server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ServerEvent {
    /// A server starts, with this model.
    Start(PathBuf),
    /// It finishes what is in hand and ends, as after SIGTERM.
    Stop,
    /// It dies, and its system resets its connections.
    Kill,
}

/// A network with one device and one server.
#[derive(Clone, Debug)]
pub struct Network {
    /// Of jitter and loss.
    pub seed: u64,
    /// The link; nothing passes before its first entry.
    pub link: Timeline,
    /// The server, ascending in time; there is none before its first start.
    pub server: Vec<(Duration, ServerEvent)>,
    /// Threads that compute for the server.
    pub threads: usize,
}

impl Network {
    /// An address for [`EngineConfig::servers`](crate::EngineConfig::servers): whatever is dialled reaches the server.
    pub const SERVER: &str = "http://server:7070";

    /// Runs `device` beside the server, on a thread of its own. Virtual time is `tokio::time`'s, and begins at 0 when
    /// `device` is called.
    ///
    /// # Errors
    /// The server's, or that there is no runtime to be had.
    pub fn run<T: Send, F: Future<Output = T>>(
        self,
        device: impl FnOnce(Dial) -> F + Send,
    ) -> Result<T, outrigger_server::Error> {
        let live = || {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_time()
                .start_paused(true)
                .build()
                .expect("a runtime on this thread takes no resource that can be refused");
            runtime.block_on(self.live(device))
        };
        // The caller may be in a runtime, whose time is real.
        std::thread::scope(|scope| match scope.spawn(live).join() {
            Ok(result) => result,
            Err(panic) => std::panic::resume_unwind(panic),
        })
    }

    async fn live<T, F: Future<Output = T>>(
        self,
        device: impl FnOnce(Dial) -> F,
    ) -> Result<T, outrigger_server::Error> {
        let medium = Mutex::new(Medium::new(self.link, self.seed));
        let wires = Arc::new(Wires {
            shared: Arc::new(Shared { epoch: Instant::now(), medium }),
            server: Mutex::new(None),
        });
        let host = tokio::spawn(host(wires.clone(), self.server, self.threads));
        // The host starts what starts at 0 before the device dials.
        tokio::task::yield_now().await;
        let outcome = device(wires.dial()).await;
        if host.is_finished()
            && let Ok(Err(error)) = host.await
        {
            return Err(error);
        }
        Ok(outcome)
    }
}

/// The link, and who listens at its end.
struct Wires {
    shared: Arc<Shared>,
    server: Mutex<Option<Listener>>,
}

struct Listener {
    accept: mpsc::UnboundedSender<io::Result<Stream>>,
    connections: Vec<Killer>,
}

impl Wires {
    fn dial(self: Arc<Wires>) -> Dial {
        Dial::new(move |endpoint| {
            let wires = self.clone();
            endpoint.connect_with_connector_lazy(tower::service_fn(move |_: Uri| {
                let wires = wires.clone();
                async move { wires.connect().await.map(TokioIo::new) }
            }))
        })
    }

    /// One round trip; the server accepts half-way.
    async fn connect(&self) -> io::Result<Stream> {
        self.travel(Way::Up).await;
        let accepted = self.accept();
        self.travel(Way::Down).await;
        accepted.ok_or_else(|| io::ErrorKind::ConnectionRefused.into())
    }

    fn accept(&self) -> Option<Stream> {
        let mut server = lock(&self.server);
        let listener = server.as_mut()?;
        let (device, server) = connection(&self.shared);
        listener.connections.push(Killer::of_server(&server));
        listener.accept.send(Ok(server)).ok()?;
        Some(device)
    }

    /// Until an empty packet has arrived, which may be never.
    async fn travel(&self, way: Way) {
        match self.shared.arrival(way, 0) {
            Some(arrival) => sleep_until(arrival).await,
            None => std::future::pending().await,
        }
    }
}

/// A server that runs. Dropping this does not end it.
struct Process {
    stop: oneshot::Sender<()>,
    serving: JoinHandle<Result<(), outrigger_server::Error>>,
}

/// Starts and ends servers as the timeline says.
async fn host(
    wires: Arc<Wires>,
    events: Vec<(Duration, ServerEvent)>,
    threads: usize,
) -> Result<(), outrigger_server::Error> {
    let mut process: Option<Process> = None;
    for (at, event) in events {
        sleep_until(wires.shared.epoch + at).await;
        match (event, process.take()) {
            (ServerEvent::Start(model), _) => process = Some(start(&wires, model, threads)?),
            (_, None) => {}
            (ServerEvent::Stop, Some(process)) => {
                *lock(&wires.server) = None;
                // A server that has failed by itself needs no order.
                let _ = process.stop.send(());
            }
            (ServerEvent::Kill, Some(process)) => {
                let listener = lock(&wires.server).take();
                process.serving.abort();
                for connection in listener.iter().flat_map(|listener| &listener.connections) {
                    connection.kill();
                }
            }
        }
    }
    Ok(())
}

fn start(
    wires: &Wires,
    model: PathBuf,
    threads: usize,
) -> Result<Process, outrigger_server::Error> {
    let compute = Compute::Inline;
    let server =
        ExpertServer::open(ServerConfig { model, threads, compute, ..ServerConfig::default() })?;
    let (accept, accepted) = mpsc::unbounded_channel();
    let (stop, stopped) = oneshot::channel();
    let incoming = UnboundedReceiverStream::new(accepted);
    let serving = tokio::spawn(server.serve(incoming, None, async {
        // A dropped sender is no order to stop.
        if stopped.await.is_err() {
            std::future::pending().await
        }
    }));
    *lock(&wires.server) = Some(Listener { accept, connections: Vec::new() });
    Ok(Process { stop, serving })
}
