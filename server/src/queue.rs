//! The bounded queue between the handlers and the one thread that computes.
//!
//! While a batch is computed, others gather, and [`Schedule`] says which of them make the next. A device that has the
//! server to itself waits for nobody, not even for the compute thread: its handler computes.

mod schedule;

use std::convert::Infallible;
use std::mem::discriminant;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread;
use std::time::{Duration, Instant};

use outrigger_proto::PUSHBACK;
use tokio::sync::{Notify, oneshot};
use tonic::Status;
use tonic::metadata::MetadataMap;

use crate::engine::{Engine, Sums};
use crate::metrics::Metrics;
use crate::request::Work;
use crate::{Error, Result};
use schedule::Schedule;

/// What a handler may compute by itself: other connections wait so long for their thread.
const SHORT: Duration = Duration::from_millis(10);

/// How long an IO thread stays awake for a lone device: about what the device computes between two layers.
const AWAKE: Duration = Duration::from_millis(2);

/// Requests on their way to the compute thread, which ends when this is dropped.
pub(crate) struct Queue(Arc<Shared>);

struct Shared {
    /// Taken before `state`, by whoever computes.
    engine: Mutex<Engine>,
    state: Mutex<State>,
    ready: Condvar,
    /// Told when a request was computed at once.
    alone: Arc<Notify>,
    limits: Limits,
    metrics: Arc<Metrics>,
}

/// What may wait.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    /// Rows of all requests.
    pub(crate) rows: usize,
    /// Rows of a batch.
    pub(crate) batch_rows: usize,
    /// The longest that a request is to wait.
    pub(crate) wait: Duration,
}

struct State {
    schedule: Schedule<Job>,
    thread: Thread,
    /// Whose request came last.
    device: usize,
    /// Nothing more is taken.
    closed: bool,
}

/// What the compute thread is doing, as far as its wake-up is concerned.
#[derive(PartialEq)]
enum Thread {
    Busy,
    Asleep,
    /// Waits for the devices that it answered.
    Gathering,
}

struct Job {
    work: Work,
    answer: oneshot::Sender<Result<Sums, Status>>,
}

impl Queue {
    /// Starts the compute thread. The receiver fails when it has ended.
    pub(crate) fn start(
        engine: Engine,
        limits: Limits,
        metrics: Arc<Metrics>,
    ) -> Result<(Queue, oneshot::Receiver<()>)> {
        let shared = Arc::new(Shared::new(engine, limits, metrics));
        let (alive, ended) = oneshot::channel();
        let worker = Worker { shared: shared.clone(), _alive: alive };
        thread::Builder::new()
            .name("compute".into())
            .spawn(move || worker.work())
            .map_err(|source| Error::Thread { name: "compute", source })?;
        Ok((Queue(shared), ended))
    }

    /// For [`stay_awake`].
    pub(crate) fn alone(&self) -> Arc<Notify> {
        self.0.alone.clone()
    }

    /// Computes `work`, when its turn comes. A caller that stops waiting is not computed for.
    pub(crate) async fn run(&self, work: Work) -> Result<Sums, Status> {
        if let Some(answer) = self.0.run_at_once(&work) {
            self.0.alone.notify_one();
            return answer;
        }
        let (answer, answered) = oneshot::channel();
        self.0.push(Job { work, answer })?;
        answered.await.unwrap_or_else(|_| Err(stopped()))
    }
}

/// Keeps an IO thread from sleep for a moment whenever a device was `alone`: its next request comes soon, and on many
/// machines it takes longer to wake up than all else that a call costs beside its computation. Never returns.
pub(crate) async fn stay_awake(alone: Arc<Notify>) -> Infallible {
    loop {
        alone.notified().await;
        let until = Instant::now() + AWAKE;
        while Instant::now() < until {
            // Devices on this machine may need the core.
            thread::yield_now();
            tokio::task::yield_now().await;
        }
    }
}

impl Drop for Queue {
    fn drop(&mut self) {
        self.0.close();
    }
}

impl Shared {
    fn new(engine: Engine, limits: Limits, metrics: Arc<Metrics>) -> Shared {
        let schedule = Schedule::new(limits.wait);
        let state = State { schedule, thread: Thread::Busy, device: 0, closed: false };
        let (engine, state) = (Mutex::new(engine), Mutex::new(state));
        let (ready, alone) = (Condvar::new(), Arc::default());
        Shared { engine, state, ready, alone, limits, metrics }
    }

    /// Computes a short request on the calling thread where one device has the server to itself: neither it nor its
    /// answer waits for another thread to wake up.
    fn run_at_once(&self, work: &Work) -> Option<Result<Sums, Status>> {
        let mut engine = {
            let mut state = self.lock();
            // While this thread computes, it reads no requests that could be computed along with others.
            let same = std::mem::replace(&mut state.device, work.device) == work.device;
            let schedule = &state.schedule;
            if state.closed || !same || !schedule.is_quiet() || schedule.time(work.rows) > SHORT {
                return None;
            }
            self.engine.try_lock().ok()?
        };
        self.compute(&mut engine, &[work]).pop()
    }

    fn push(&self, job: Job) -> Result<(), Status> {
        let mut state = self.lock();
        if state.closed {
            return Err(stopped());
        }
        // A request that is larger than the queue is taken when nothing else waits.
        let schedule = &mut state.schedule;
        let rows = schedule.rows() + job.work.rows;
        if !schedule.is_empty()
            && (rows > self.limits.rows || schedule.time(rows) > self.limits.wait)
        {
            return Err(overloaded(schedule));
        }
        let kind = (job.work.layer, discriminant(&job.work.activations));
        schedule.push(Instant::now(), kind, job.work.rows, job.work.device, job);
        let complete = schedule.is_complete();
        self.metrics.queue_rows.set(rows as i64);
        if state.thread == Thread::Asleep || state.thread == Thread::Gathering && complete {
            state.thread = Thread::Busy;
            self.ready.notify_one();
        }
        Ok(())
    }

    /// What is to be computed next, as soon as there is something; `None` at the end.
    fn next_batch(&self) -> Option<Vec<Job>> {
        let mut state = self.lock();
        while let Some(wait) = self.gathering(&state) {
            state.thread = Thread::Gathering;
            state = self.ready.wait_timeout(state, wait).expect("nothing panics under this lock").0;
        }
        state.thread = Thread::Busy;
        state.schedule.forget(|job| job.answer.is_closed());
        let batch = state.schedule.take(Instant::now(), self.limits.batch_rows);
        self.metrics.queue_rows.set(state.schedule.rows() as i64);
        (!batch.is_empty() || !state.closed).then_some(batch)
    }

    /// How long to wait for more.
    fn gathering(&self, state: &State) -> Option<Duration> {
        let until = state.schedule.gather_until().filter(|_| !state.closed)?;
        until.checked_duration_since(Instant::now()).filter(|wait| !wait.is_zero())
    }

    /// Returns when requests wait, or when the queue is closed.
    fn wait_for_requests(&self) {
        let mut state = self.lock();
        while state.schedule.is_empty() && !state.closed {
            state.thread = Thread::Asleep;
            state = self.ready.wait(state).expect("nothing panics under this lock");
        }
        state.thread = Thread::Busy;
    }

    /// Runs a batch, which has at least one request.
    fn compute(&self, engine: &mut Engine, batch: &[&Work]) -> Vec<Result<Sums, Status>> {
        let started = Instant::now();
        let answers = engine.run(batch);
        let now = Instant::now();
        let rows = batch.iter().map(|work| work.rows).sum();
        let devices = batch.iter().map(|work| work.device).collect();
        self.lock().schedule.ended(now, batch[0].layer, devices, rows, now - started);
        answers
    }

    fn close(&self) {
        self.lock().closed = true;
        self.ready.notify_one();
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("nothing panics under this lock")
    }
}

fn overloaded(schedule: &Schedule<Job>) -> Status {
    let rows = schedule.rows();
    let message = format!("the queue is full: {rows} rows wait");
    sent_away(tonic::Code::Unavailable, message, schedule.time(rows))
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
    /// Dropped with the thread, which tells the server.
    _alive: oneshot::Sender<()>,
}

impl Worker {
    fn work(self) {
        let shared = &*self.shared;
        loop {
            shared.wait_for_requests();
            // A handler that panicked over it ends this thread too.
            let Ok(mut engine) = shared.engine.lock() else { return };
            let Some(batch) = shared.next_batch() else { return };
            if batch.is_empty() {
                continue;
            }
            let work: Vec<&Work> = batch.iter().map(|job| &job.work).collect();
            let answers = shared.compute(&mut engine, &work);
            for (job, answer) in batch.into_iter().zip(answers) {
                // A caller that has gone meanwhile needs no answer.
                let _ = job.answer.send(answer);
            }
        }
    }
}

impl Drop for Worker {
    /// After a panic nobody waits for an answer that never comes.
    fn drop(&mut self) {
        self.shared.close();
        self.shared.lock().schedule.forget(|_| true);
    }
}

#[cfg(test)]
mod tests;
