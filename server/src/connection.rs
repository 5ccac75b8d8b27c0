//! Connections: so many at a time, and none without a request for long.
//!
//! One deadline covers everything that a peer can do slowly before it is of use, or instead: the TLS handshake, the
//! HTTP/2 preface, headers, and silence. Another one covers answers that it does not read.

use std::any::Any;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, Weak};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, Sleep, sleep, sleep_until};
use tokio_stream::{Stream, StreamExt as _};
use tonic::transport::server::{Connected, TcpConnectInfo, TlsConnectInfo};

use crate::ServerConfig;
use crate::metrics::Metrics;

/// How long no connection is accepted after one that could not be.
const ACCEPT_PAUSE: Duration = Duration::from_secs(1);

pub(crate) type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// The connections of `incoming`. Where there is none to be had, as without file descriptors, the next one is accepted
/// after a pause.
pub(crate) fn accepted<IO, E: Into<BoxError>>(
    incoming: impl Stream<Item = Result<IO, E>>,
) -> impl Stream<Item = IO> {
    let accepted = incoming.then(async |io| match io.map_err(Into::into) {
        Ok(io) => Some(io),
        Err(error) => {
            tracing::warn!(error, "cannot accept a connection");
            sleep(ACCEPT_PAUSE).await;
            None
        }
    });
    accepted.filter_map(|io| io)
}

/// Those of them that are within the limits; others are closed at once, so that a device can go elsewhere.
pub(crate) fn limit<IO: Connected>(
    accepted: impl Stream<Item = IO>,
    limits: Limits,
    metrics: Arc<Metrics>,
) -> impl Stream<Item = Limited<IO>> {
    let places = Arc::new(Semaphore::new(limits.connections));
    accepted.filter_map(move |io| {
        let Ok(place) = places.clone().try_acquire_owned() else {
            metrics.connections_refused.inc();
            return None;
        };
        let info: Box<dyn Any> = Box::new(io.connect_info());
        let peer = info.downcast_ref().and_then(TcpConnectInfo::remote_addr);
        Some(Limited::new(io, peer, limits, metrics.clone(), place))
    })
}

/// What connections may take.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    connections: usize,
    /// From the connection to its first request.
    first_request: Duration,
    /// From one request to the next.
    idle: Duration,
    /// From an answer until all of it is written, and between two writes.
    answer: Duration,
}

impl Limits {
    pub(crate) fn of(config: &ServerConfig) -> Limits {
        Limits {
            connections: config.max_connections,
            first_request: config.first_request_timeout,
            idle: config.idle_timeout,
            answer: config.answer_timeout,
        }
    }
}

/// When a connection is closed unless something happens. Each request of the connection carries it.
#[derive(Clone, Debug)]
pub(crate) struct Due {
    state: Arc<Mutex<State>>,
    limits: Limits,
    /// Who is at the other end, where there are addresses.
    pub(crate) peer: Option<SocketAddr>,
}

#[derive(Debug)]
struct State {
    /// When the next request is due.
    request: Instant,
    /// When each answer is to be taken, in this order. One that was taken has no token any more.
    answers: Vec<(Instant, Weak<()>)>,
}

impl Due {
    fn new(limits: Limits, peer: Option<SocketAddr>) -> Due {
        let state = State { request: Instant::now() + limits.first_request, answers: Vec::new() };
        Due { state: Arc::new(Mutex::new(state)), limits, peer }
    }

    /// That of a request's connection, TLS or not.
    pub(crate) fn of(extensions: &tonic::Extensions) -> Option<&Due> {
        let secured = || extensions.get::<TlsConnectInfo<Due>>().map(TlsConnectInfo::get_ref);
        extensions.get().or_else(secured)
    }

    /// Tells the connection from the others that are open.
    pub(crate) fn connection(&self) -> usize {
        Arc::as_ptr(&self.state).addr()
    }

    /// A request has come.
    pub(crate) fn put_off(&self) {
        self.lock().request = Instant::now() + self.limits.idle;
    }

    /// An answer goes out. Its token is to be dropped when the last of it was written.
    pub(crate) fn answer(&self) -> Arc<()> {
        let held = Arc::new(());
        let answers = &mut self.lock().answers;
        answers.retain(|(_, held)| held.strong_count() > 0);
        answers.push((Instant::now() + self.limits.answer, Arc::downgrade(&held)));
        held
    }

    /// When the next request is due, and when the first answer that is left is to be taken.
    fn at(&self) -> (Instant, Option<Instant>) {
        let state = self.lock();
        let mut left = state.answers.iter().filter(|(_, held)| held.strong_count() > 0);
        (state.request, left.next().map(|(at, _)| *at))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("nothing panics under this lock")
    }
}

/// A connection that is counted, and closed when it is due.
pub(crate) struct Limited<IO> {
    io: IO,
    due: Due,
    /// When a write that cannot go on is given up.
    stuck: Option<Instant>,
    /// Ends when the connection was due when it was last looked at, or earlier.
    alarm: Pin<Box<Sleep>>,
    overdue: bool,
    metrics: Arc<Metrics>,
    _place: OwnedSemaphorePermit,
}

impl<IO> Limited<IO> {
    pub(crate) fn peer(&self) -> Option<SocketAddr> {
        self.due.peer
    }

    fn new(
        io: IO,
        peer: Option<SocketAddr>,
        limits: Limits,
        metrics: Arc<Metrics>,
        place: OwnedSemaphorePermit,
    ) -> Limited<IO> {
        let due = Due::new(limits, peer);
        metrics.connections.inc();
        let alarm = Box::pin(sleep_until(due.lock().request));
        Limited { io, due, stuck: None, alarm, overdue: false, metrics, _place: place }
    }

    /// Ready when the peer has not done in time what was due.
    fn poll_due(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        while !self.overdue {
            let (request, answer) = self.due.at();
            let read = [answer, self.stuck].into_iter().flatten().min();
            let at = read.map_or(request, |read| read.min(request));
            if at <= Instant::now() {
                self.overdue = true;
                let metrics = &self.metrics;
                let idle = at == request;
                let count =
                    if idle { &metrics.connections_idle } else { &metrics.connections_unread };
                count.inc();
                return Poll::Ready(());
            }
            // It may ring too early, which is looked into then.
            if at < self.alarm.deadline() || self.alarm.is_elapsed() {
                self.alarm.as_mut().reset(at);
            }
            ready!(self.alarm.as_mut().poll(cx));
        }
        Poll::Ready(())
    }

    /// What came of a write.
    fn wrote(
        &mut self,
        cx: &mut Context<'_>,
        written: Poll<io::Result<usize>>,
    ) -> Poll<io::Result<usize>> {
        match written? {
            Poll::Ready(written) => {
                self.stuck = None;
                self.metrics.sent.inc_by(written as u64);
                Poll::Ready(Ok(written))
            }
            Poll::Pending => {
                let give_up = Instant::now() + self.due.limits.answer;
                self.stuck.get_or_insert(give_up);
                self.poll_due(cx).map(|()| Err(io::ErrorKind::TimedOut.into()))
            }
        }
    }
}

impl<IO> Drop for Limited<IO> {
    fn drop(&mut self) {
        self.metrics.connections.dec();
    }
}

impl<IO: Connected> Connected for Limited<IO> {
    type ConnectInfo = Due;

    fn connect_info(&self) -> Due {
        self.due.clone()
    }
}

impl<IO: AsyncRead + Unpin> AsyncRead for Limited<IO> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.poll_due(cx).is_ready() {
            // Reads as the end of what the peer sends.
            return Poll::Ready(Ok(()));
        }
        let before = buffer.filled().len();
        ready!(Pin::new(&mut self.io).poll_read(cx, buffer))?;
        self.metrics.received.inc_by((buffer.filled().len() - before) as u64);
        Poll::Ready(Ok(()))
    }
}

impl<IO: AsyncWrite + Unpin> AsyncWrite for Limited<IO> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.io).poll_write(cx, bytes);
        self.wrote(cx, written)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.io).poll_write_vectored(cx, slices);
        self.wrote(cx, written)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }
}
