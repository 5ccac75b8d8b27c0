//! The bounded queue between the handlers and the one thread that computes.
//!
//! Nothing waits for company: the thread takes the oldest request as soon as it is free, and with it
//! whatever else waits for the same layer. A lone request therefore pays nothing for batching, and
//! under load batches grow by themselves.

use std::collections::VecDeque;
use std::mem::discriminant;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread;
use std::time::{Duration, Instant};

use tokio::sync::oneshot;
use tonic::Status;
use tonic::metadata::MetadataMap;

use crate::engine::{Engine, Sums};
use crate::metrics::Metrics;
use crate::request::Work;
use crate::{Error, Result};

/// How long the idle thread looks for work before it sleeps: about as long as a device takes to its
/// next layer, which then need not wait some tens of microseconds until this thread is awake. It
/// yields all the while to whoever has something to do.
const SPIN: Duration = Duration::from_millis(1);

/// Tells a caller that was sent away when to come back, in milliseconds (gRPC proposal A6).
const PUSHBACK: &str = "grpc-retry-pushback-ms";

/// Requests on their way to the compute thread, which ends when this is dropped.
pub(crate) struct Queue(Arc<Shared>);

struct Shared {
    state: Mutex<State>,
    ready: Condvar,
    /// Jobs in `state`, to look at without the lock.
    jobs: AtomicUsize,
    /// Rows that may wait.
    limit: usize,
    metrics: Arc<Metrics>,
}

#[derive(Default)]
struct State {
    jobs: VecDeque<Job>,
    /// Rows of all jobs.
    rows: usize,
    /// The thread sleeps, or is about to.
    asleep: bool,
    /// Nothing more is taken.
    closed: bool,
    /// Recent time a row.
    per_row: Duration,
}

struct Job {
    work: Work,
    answer: oneshot::Sender<Result<Sums, Status>>,
}

impl Queue {
    /// Starts the compute thread. At most `limit` rows wait, and a batch has at most `max_rows`.
    /// The receiver fails when the thread has ended.
    pub(crate) fn start(
        engine: Engine,
        limit: usize,
        max_rows: usize,
        metrics: Arc<Metrics>,
    ) -> Result<(Queue, oneshot::Receiver<()>)> {
        let shared = Arc::new(Shared {
            state: Mutex::default(),
            ready: Condvar::new(),
            jobs: AtomicUsize::new(0),
            limit,
            metrics,
        });
        let (alive, ended) = oneshot::channel();
        let worker = Worker { shared: shared.clone(), engine, max_rows, _alive: alive };
        thread::Builder::new()
            .name("compute".into())
            .spawn(move || worker.work())
            .map_err(Error::Thread)?;
        Ok((Queue(shared), ended))
    }

    /// Computes `work`, when its turn comes. A caller that stops waiting is not computed for.
    pub(crate) async fn run(&self, work: Work) -> Result<Sums, Status> {
        let (answer, answered) = oneshot::channel();
        self.0.push(Job { work, answer })?;
        answered.await.unwrap_or_else(|_| Err(stopped()))
    }
}

impl Drop for Queue {
    fn drop(&mut self) {
        self.0.close();
    }
}

impl Shared {
    fn push(&self, job: Job) -> Result<(), Status> {
        let mut state = self.lock();
        if state.closed {
            return Err(stopped());
        }
        // A request that is larger than the queue is taken when nothing else waits.
        let rows = state.rows + job.work.rows;
        if rows > self.limit && !state.jobs.is_empty() {
            return Err(overloaded(&state));
        }
        state.jobs.push_back(job);
        self.waiting(&mut state, rows);
        if std::mem::take(&mut state.asleep) {
            self.ready.notify_one();
        }
        Ok(())
    }

    /// The oldest job and all others of its layer and form, up to `max_rows`; `None` at the end.
    fn next_batch(&self, max_rows: usize) -> Option<Vec<Job>> {
        let mut state = self.wait_for_jobs();
        if state.jobs.is_empty() {
            return None;
        }
        let mut batch: Vec<Job> = Vec::new();
        let mut rows = 0;
        let mut rest = VecDeque::new();
        for job in std::mem::take(&mut state.jobs) {
            if job.answer.is_closed() {
                continue;
            }
            if batch.first().is_none_or(|first| {
                alike(&first.work, &job.work) && rows + job.work.rows <= max_rows
            }) {
                rows += job.work.rows;
                batch.push(job);
            } else {
                rest.push_back(job);
            }
        }
        state.jobs = rest;
        let rows = state.jobs.iter().map(|job| job.work.rows).sum();
        self.waiting(&mut state, rows);
        Some(batch)
    }

    /// Makes known that the jobs in `state` have so many rows.
    fn waiting(&self, state: &mut State, rows: usize) {
        state.rows = rows;
        self.jobs.store(state.jobs.len(), Ordering::Release);
        self.metrics.queue_rows.set(rows as i64);
    }

    /// Returns with jobs, or without when the queue is closed.
    fn wait_for_jobs(&self) -> MutexGuard<'_, State> {
        let spin_until = Instant::now() + SPIN;
        while self.jobs.load(Ordering::Acquire) == 0 && Instant::now() < spin_until {
            thread::yield_now();
        }
        let mut state = self.lock();
        while state.jobs.is_empty() && !state.closed {
            state.asleep = true;
            state = self.ready.wait(state).expect("nothing panics under this lock");
        }
        state.asleep = false;
        state
    }

    fn finished(&self, rows: usize, took: Duration) {
        let mut state = self.lock();
        let per_row = took / rows as u32;
        state.per_row = match state.per_row {
            Duration::ZERO => per_row,
            smoothed => (smoothed * 7 + per_row) / 8,
        };
    }

    fn close(&self) {
        self.lock().closed = true;
        self.ready.notify_one();
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("nothing panics under this lock")
    }
}

/// Whether two requests can be computed together.
fn alike(a: &Work, b: &Work) -> bool {
    a.layer == b.layer && discriminant(&a.activations) == discriminant(&b.activations)
}

fn overloaded(state: &State) -> Status {
    let message = format!("the queue is full: {} rows wait", state.rows);
    sent_away(tonic::Code::Unavailable, message, state.per_row * state.rows as u32)
}

/// A refusal that says when to come back.
pub(crate) fn sent_away(code: tonic::Code, message: String, wait: Duration) -> Status {
    let mut metadata = MetadataMap::new();
    let millis = wait.as_millis().clamp(1, 10_000) as u64;
    metadata.insert(PUSHBACK, millis.into());
    Status::with_metadata(code, message, metadata)
}

fn stopped() -> Status {
    Status::internal("the compute thread has stopped")
}

/// The compute thread.
struct Worker {
    shared: Arc<Shared>,
    engine: Engine,
    max_rows: usize,
    /// Dropped with the thread, which tells the server.
    _alive: oneshot::Sender<()>,
}

impl Worker {
    fn work(mut self) {
        while let Some(batch) = self.shared.next_batch(self.max_rows) {
            if batch.is_empty() {
                continue;
            }
            let work: Vec<&Work> = batch.iter().map(|job| &job.work).collect();
            let rows = work.iter().map(|work| work.rows).sum();
            let started = Instant::now();
            let answers = self.engine.run(&work);
            for (job, answer) in batch.into_iter().zip(answers) {
                // A caller that has gone meanwhile needs no answer.
                let _ = job.answer.send(answer);
            }
            self.shared.finished(rows, started.elapsed());
        }
    }
}

impl Drop for Worker {
    /// After a panic nobody waits for an answer that never comes.
    fn drop(&mut self) {
        self.shared.close();
        self.shared.lock().jobs.clear();
    }
}

#[cfg(test)]
mod tests;
