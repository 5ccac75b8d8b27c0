//! A TCP proxy that makes a link slow, narrow or dead: for the demo, for tests, and for trying a bad network at home.

use std::net::SocketAddr;
use std::num::NonZeroU64;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::Instant;

/// Time to look for another connection where the system has none to give.
const ACCEPT_PAUSE: Duration = Duration::from_secs(1);

/// What the link does to bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Conditions {
    /// Half of the round trip that the link adds.
    pub delay: Duration,
    /// Bytes a second in each direction; unlimited if absent.
    pub bandwidth: Option<NonZeroU64>,
    /// Whether bytes pass at all.
    pub state: LinkFault,
}

/// Whether bytes pass.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LinkFault {
    /// They pass.
    #[default]
    None,
    /// They vanish, and nobody is told: a pulled cable, a tunnel.
    Silent,
    /// Connections are closed and refused: a dead server.
    Refused,
}

/// A running proxy. Dropping it closes every connection.
#[derive(Debug)]
pub struct FaultProxy {
    address: SocketAddr,
    conditions: watch::Sender<Conditions>,
    _tasks: JoinSet<()>,
}

impl FaultProxy {
    /// Listens on `listen` and passes connections on to `target`, `host:port`.
    ///
    /// # Errors
    /// The address cannot be listened on.
    pub async fn start(listen: SocketAddr, target: String) -> std::io::Result<FaultProxy> {
        let listener = TcpListener::bind(listen).await?;
        let address = listener.local_addr()?;
        let (conditions, seen) = watch::channel(Conditions::default());
        let mut tasks = JoinSet::new();
        tasks.spawn(accept(listener, target, seen));
        Ok(FaultProxy { address, conditions, _tasks: tasks })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Changes the link, for bytes that arrive from now on.
    pub fn set(&self, conditions: Conditions) {
        self.conditions.send_replace(conditions);
    }
}

async fn accept(listener: TcpListener, target: String, conditions: watch::Receiver<Conditions>) {
    let mut connections = JoinSet::new();
    loop {
        let Ok((inbound, _)) = listener.accept().await else {
            tokio::time::sleep(ACCEPT_PAUSE).await;
            continue;
        };
        while connections.try_join_next().is_some() {}
        if conditions.borrow().state != LinkFault::Refused {
            connections.spawn(connect(inbound, target.clone(), conditions.clone()));
        }
    }
}

async fn connect(inbound: TcpStream, target: String, conditions: watch::Receiver<Conditions>) {
    let Ok(outbound) = TcpStream::connect(&target).await else { return };
    let _ = (inbound.set_nodelay(true), outbound.set_nodelay(true));
    let (from_client, to_client) = inbound.into_split();
    let (from_server, to_server) = outbound.into_split();
    let mut refused = conditions.clone();
    tokio::select! {
        () = pump(from_client, to_server, conditions.clone()) => {}
        () = pump(from_server, to_client, conditions) => {}
        _ = refused.wait_for(|now| now.state == LinkFault::Refused) => {}
    }
}

/// Reads, holds for the delay, writes; reading goes on while earlier bytes are held.
async fn pump(
    mut from: tokio::net::tcp::OwnedReadHalf,
    mut to: tokio::net::tcp::OwnedWriteHalf,
    conditions: watch::Receiver<Conditions>,
) {
    let (send, mut receive) = mpsc::channel::<(Instant, Vec<u8>)>(256);
    let mut gate = conditions.clone();
    let read = async move {
        let mut buffer = vec![0; 64 << 10];
        // When the link is free again: it serialises bytes at its bandwidth.
        let mut free = Instant::now();
        while let Ok(count @ 1..) = from.read(&mut buffer).await {
            let now = *conditions.borrow();
            let airtime = now.bandwidth.map_or(0.0, |rate| count as f64 / rate.get() as f64);
            free = free.max(Instant::now()) + Duration::from_secs_f64(airtime);
            if send.send((free + now.delay, buffer[..count].to_vec())).await.is_err() {
                return;
            }
        }
    };
    let write = async move {
        while let Some((due, bytes)) = receive.recv().await {
            wait_until(due).await;
            // A silent link keeps what it has swallowed: TCP would send it again once the link is back.
            if gate.wait_for(|now| now.state != LinkFault::Silent).await.is_err()
                || to.write_all(&bytes).await.is_err()
            {
                return;
            }
        }
    };
    tokio::join!(read, write);
}

/// The runtime's timer counts whole milliseconds, upwards, and a thread that sleeps wakes up late: the rest is spent
/// awake.
async fn wait_until(due: Instant) {
    const TICK: Duration = Duration::from_millis(1);
    if let Some(early) = due.checked_sub(2 * TICK).filter(|early| *early > Instant::now()) {
        tokio::time::sleep_until(early).await;
    }
    while Instant::now() < due {
        tokio::task::yield_now().await;
    }
}
