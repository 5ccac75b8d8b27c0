//! A simulated connection: bytes that arrive when the medium says.

use std::collections::VecDeque;
use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard};
use std::task::{Context, Poll, Waker};

use bytes::{Buf, Bytes};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::{Instant, Sleep, sleep_until};
use tonic::transport::server::Connected;

use super::medium::{Medium, Way};

/// What both ends of every connection share.
pub(super) struct Shared {
    /// Virtual time 0.
    pub(super) epoch: Instant,
    pub(super) medium: Mutex<Medium>,
}

impl Shared {
    /// When `bytes` that are sent now arrive, if ever.
    pub(super) fn arrival(&self, way: Way, bytes: usize) -> Option<Instant> {
        let arrival = lock(&self.medium).deliver(way, self.epoch.elapsed(), bytes);
        arrival.map(|time| self.epoch + time)
    }
}

/// One way of a connection.
#[derive(Default)]
struct Pipe {
    /// What is under way, and when it arrives: in order, since TCP delivers in order.
    queue: VecDeque<(Instant, Item)>,
    reader: Option<Waker>,
    /// Nothing comes any more after what is queued.
    ended: bool,
}

enum Item {
    Bytes(Bytes),
    End,
    Reset,
}

impl Pipe {
    /// Queues an item behind the others; one that never arrives blocks those behind it for good.
    fn push(&mut self, arrives: Option<Instant>, item: Item) {
        self.ended |= arrives.is_none() || !matches!(item, Item::Bytes(_));
        let Some(arrives) = arrives else { return };
        let arrives = self.queue.back().map_or(arrives, |last| arrives.max(last.0));
        self.queue.push_back((arrives, item));
        if let Some(reader) = self.reader.take() {
            reader.wake();
        }
    }
}

/// One end of a connection.
pub(super) struct Stream {
    shared: Arc<Shared>,
    incoming: Arc<Mutex<Pipe>>,
    outgoing: Arc<Mutex<Pipe>>,
    /// The way of what this end writes.
    way: Way,
    meter: FrameMeter,
    arrival: Pin<Box<Sleep>>,
}

/// Both ends of a new connection: the device's and the server's.
pub(super) fn connection(shared: &Arc<Shared>) -> (Stream, Stream) {
    let (up, down) = (Arc::default(), Arc::default());
    let end = |incoming: &Arc<_>, outgoing: &Arc<_>, way, meter| Stream {
        shared: shared.clone(),
        incoming: Arc::clone(incoming),
        outgoing: Arc::clone(outgoing),
        way,
        meter,
        arrival: Box::pin(sleep_until(Instant::now())),
    };
    let device = end(&down, &up, Way::Up, FrameMeter::behind_preface());
    let server = end(&up, &down, Way::Down, FrameMeter::default());
    (device, server)
}

/// Kills the server's end of a connection, as its system does when the process dies.
#[derive(Clone)]
pub(super) struct Killer {
    shared: Arc<Shared>,
    up: Arc<Mutex<Pipe>>,
    down: Arc<Mutex<Pipe>>,
}

impl Killer {
    pub(super) fn of_server(end: &Stream) -> Killer {
        let (up, down) = (end.incoming.clone(), end.outgoing.clone());
        Killer { shared: end.shared.clone(), up, down }
    }

    pub(super) fn kill(&self) {
        let mut up = lock(&self.up);
        up.queue.clear();
        up.push(Some(Instant::now()), Item::Reset);
        let mut down = lock(&self.down);
        if !down.ended {
            down.push(self.shared.arrival(Way::Down, 0), Item::Reset);
        }
    }
}

impl AsyncRead for Stream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = &mut *self;
        let mut pipe = lock(&this.incoming);
        pipe.reader = Some(cx.waker().clone());
        let Some((arrives, item)) = pipe.queue.front_mut() else { return Poll::Pending };
        if *arrives > Instant::now() {
            this.arrival.as_mut().reset(*arrives);
            std::task::ready!(this.arrival.as_mut().poll(cx));
        }
        match item {
            Item::Reset => return Poll::Ready(Err(io::ErrorKind::ConnectionReset.into())),
            Item::End => {}
            Item::Bytes(bytes) => {
                let part = bytes.split_to(bytes.len().min(buf.remaining()));
                buf.put_slice(&part);
                if !bytes.has_remaining() {
                    pipe.queue.pop_front();
                }
            }
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Stream {
    fn poll_write(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        let charged = self.meter.charge(buf);
        let mut pipe = lock(&self.outgoing);
        if !pipe.ended {
            let arrival = self.shared.arrival(self.way, charged);
            pipe.push(arrival, Item::Bytes(Bytes::copy_from_slice(buf)));
        }
        Poll::Ready(Ok(buf.len()))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        let mut pipe = lock(&self.outgoing);
        if !pipe.ended {
            pipe.push(self.shared.arrival(self.way, 0), Item::End);
        }
        Poll::Ready(Ok(()))
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        let mut pipe = lock(&self.outgoing);
        if !pipe.ended {
            pipe.push(self.shared.arrival(self.way, 0), Item::End);
        }
    }
}

impl Connected for Stream {
    type ConnectInfo = ();

    fn connect_info(&self) {}
}

/// Counts the bytes of HTTP/2's DATA frames. The others are not charged: they are small, and how many there are and
/// how long depends on the wall clock (the `date` header, streams that were reset a while ago), which would make runs
/// differ.
#[derive(Default)]
struct FrameMeter {
    /// Bytes of the current frame's head that were seen.
    head: [u8; FRAME_HEAD],
    seen: usize,
    /// Bytes of the current frame that are to come.
    left: usize,
    data: bool,
}

const FRAME_HEAD: usize = 9;
const DATA: u8 = 0;
/// `PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n`, with which a client begins.
const PREFACE: usize = 24;

impl FrameMeter {
    fn behind_preface() -> FrameMeter {
        FrameMeter { left: PREFACE, ..FrameMeter::default() }
    }

    /// How many bytes of DATA frames these are, heads included.
    fn charge(&mut self, mut bytes: &[u8]) -> usize {
        let mut charged = 0;
        while let Some((&first, rest)) = bytes.split_first() {
            if self.left > 0 {
                let part = self.left.min(bytes.len());
                charged += if self.data { part } else { 0 };
                self.left -= part;
                bytes = &bytes[part..];
                continue;
            }
            self.head[self.seen] = first;
            self.seen += 1;
            bytes = rest;
            if self.seen == FRAME_HEAD {
                let [a, b, c, kind, ..] = self.head;
                self.seen = 0;
                self.left = u32::from_be_bytes([0, a, b, c]) as usize;
                self.data = kind == DATA;
                charged += if self.data { FRAME_HEAD } else { 0 };
            }
        }
        charged
    }
}

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(kind: u8, length: usize) -> Vec<u8> {
        let mut frame = vec![0, (length >> 8) as u8, length as u8, kind, 0, 0, 0, 0, 1];
        frame.resize(FRAME_HEAD + length, 0xff);
        frame
    }

    #[test]
    fn only_data_frames_count_however_they_are_cut() {
        let sent = [vec![b'P'; PREFACE], frame(4, 18), frame(0, 700), frame(1, 40), frame(0, 0)];
        let sent = sent.concat();
        for part in [1, 7, 64, sent.len()] {
            let mut meter = FrameMeter::behind_preface();
            let charged: usize = sent.chunks(part).map(|bytes| meter.charge(bytes)).sum();
            assert_eq!(charged, 700 + 2 * FRAME_HEAD, "in parts of {part}");
        }
    }
}
