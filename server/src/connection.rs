//! Connections: so many at a time, and none without a request for long.
//!
//! One deadline covers everything that a peer can do slowly before it is of use, or instead: the TLS handshake, the
//! HTTP/2 preface, headers, and silence.

use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, Sleep, sleep_until};
use tokio_stream::{Stream, StreamExt as _};
use tonic::transport::server::Connected;

use crate::ServerConfig;
use crate::metrics::Metrics;

/// The connections of `incoming`, within the limits; those on top are closed at once, so that a device can go
/// elsewhere.
pub(crate) fn limit<IO, E>(
    incoming: impl Stream<Item = Result<IO, E>>,
    limits: Limits,
    metrics: Arc<Metrics>,
) -> impl Stream<Item = Result<Limited<IO>, E>> {
    let places = Arc::new(Semaphore::new(limits.connections));
    incoming.filter_map(move |io| {
        let io = match io {
            Ok(io) => io,
            Err(error) => return Some(Err(error)),
        };
        match places.clone().try_acquire_owned() {
            Ok(place) => Some(Ok(Limited::new(io, limits, metrics.clone(), place))),
            Err(_) => {
                metrics.connections_refused.inc();
                None
            }
        }
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
}

impl Limits {
    pub(crate) fn of(config: &ServerConfig) -> Limits {
        Limits {
            connections: config.max_connections,
            first_request: config.first_request_timeout,
            idle: config.idle_timeout,
        }
    }
}

/// When a connection is closed unless a request comes. Each request of the connection carries it.
#[derive(Clone, Debug)]
pub(crate) struct Due {
    at: Arc<Mutex<Instant>>,
    idle: Duration,
}

impl Due {
    /// A request has come.
    pub(crate) fn put_off(&self) {
        *self.at.lock().expect("nothing panics under this lock") = Instant::now() + self.idle;
    }

    fn at(&self) -> Instant {
        *self.at.lock().expect("nothing panics under this lock")
    }
}

/// A connection that is counted, and closed when it is due.
pub(crate) struct Limited<IO> {
    io: IO,
    due: Due,
    /// Ends when the connection was due when it was last looked at, or later.
    alarm: Pin<Box<Sleep>>,
    metrics: Arc<Metrics>,
    _place: OwnedSemaphorePermit,
}

impl<IO> Limited<IO> {
    fn new(
        io: IO,
        limits: Limits,
        metrics: Arc<Metrics>,
        place: OwnedSemaphorePermit,
    ) -> Limited<IO> {
        let first = Instant::now() + limits.first_request;
        let due = Due { at: Arc::new(Mutex::new(first)), idle: limits.idle };
        metrics.connections.inc();
        Limited { io, due, alarm: Box::pin(sleep_until(first)), metrics, _place: place }
    }

    /// Ready when no request came in time.
    fn poll_due(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        loop {
            ready!(self.alarm.as_mut().poll(cx));
            let at = self.due.at();
            if at <= Instant::now() {
                return Poll::Ready(());
            }
            self.alarm.as_mut().reset(at);
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
            self.metrics.connections_idle.inc();
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
        match Pin::new(&mut self.io).poll_write(cx, bytes)? {
            Poll::Ready(written) => {
                self.metrics.sent.inc_by(written as u64);
                Poll::Ready(Ok(written))
            }
            // A peer that reads nothing.
            Poll::Pending => self.poll_due(cx).map(|()| Err(io::ErrorKind::TimedOut.into())),
        }
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
        match Pin::new(&mut self.io).poll_write_vectored(cx, slices)? {
            Poll::Ready(written) => {
                self.metrics.sent.inc_by(written as u64);
                Poll::Ready(Ok(written))
            }
            Poll::Pending => self.poll_due(cx).map(|()| Err(io::ErrorKind::TimedOut.into())),
        }
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }
}
