//! Fork and join over a fixed set of threads, made for regions of some tens of microseconds.
//!
//! Each thread has a share of neighbouring tasks and claims them in order: what its kernels ask for behind one task's
//! memory is what the next one reads. Who is done claims from the ends of the others' shares, so that a thread that the
//! system took away costs the others only the task that it holds. Between regions the workers spin for a moment, since
//! the next region of a token follows soon; then they park. A region takes no lock and allocates nothing.

use std::any::Any;
use std::cell::UnsafeCell;
use std::marker::PhantomData;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering, fence};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

/// How long an idle worker spins before it parks: longer than the serial work between two regions of a token.
const SPIN: Duration = Duration::from_micros(60);
/// Values that are worth a task where little is done with each.
const ROW_TASK: usize = 16 << 10;

/// A fixed set of threads; the caller of [`Pool::run`] is one of them.
pub struct Pool {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
}

type Task<'a> = dyn Fn(usize) + Sync + 'a;

struct Shared {
    /// A region is running.
    busy: AtomicBool,
    /// Tasks of the region that nobody has claimed yet, a share for each thread; the first is the caller's.
    shares: Box<[Line<Share>]>,
    /// Tasks of the region that are not finished yet.
    unfinished: Line<AtomicUsize>,
    /// The region's task: written while every share is empty and nobody runs a task; read only by who claimed one.
    task: UnsafeCell<*const Task<'static>>,
    parked: Box<[Line<AtomicBool>]>,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
    panicked: AtomicBool,
    stop: AtomicBool,
}

/// A cache line of its own.
#[repr(align(128))]
struct Line<T>(T);

/// Tasks that follow one another: the first in the upper half, the end in the lower.
struct Share(AtomicU64);

impl Share {
    fn give(&self, tasks: Range<usize>) {
        self.0.store((tasks.start as u64) << 32 | tasks.end as u64, Ordering::Release);
    }

    fn left(&self) -> Range<usize> {
        Share::range(self.0.load(Ordering::Relaxed))
    }

    fn range(both: u64) -> Range<usize> {
        (both >> 32) as usize..both as u32 as usize
    }

    fn claim_first(&self) -> Option<usize> {
        self.claim(1 << 32).map(|share| share.start)
    }

    fn claim_last(&self) -> Option<usize> {
        self.claim(u64::MAX).map(|share| share.end - 1)
    }

    /// Adds `change` to a share that is not empty; returns what it was. Where that was read in an earlier region and is as
    /// much this one's, so is the task, and so is what the claim acquires.
    fn claim(&self, change: u64) -> Option<Range<usize>> {
        let claim =
            |both: u64| (!Share::range(both).is_empty()).then_some(both.wrapping_add(change));
        self.0.fetch_update(Ordering::Acquire, Ordering::Relaxed, claim).ok().map(Share::range)
    }
}

// SAFETY: `task` is the only part that is not Sync by itself. It is written between regions only, by the thread that
// set `busy`, before the shares are given (release), and read after a successful claim (acquire). What it points to is
// Sync and outlives the region, since `run` returns only when `unfinished` is 0.
unsafe impl Sync for Shared {}
// SAFETY: as above; the pointer is used by any thread.
unsafe impl Send for Shared {}

impl Pool {
    /// A pool of `threads` threads, of which the caller is one: with 1, everything runs on the caller.
    pub fn new(threads: usize) -> Pool {
        let workers = threads.max(1) - 1;
        let shared = Arc::new(Shared {
            busy: AtomicBool::new(false),
            shares: (0..=workers).map(|_| Line(Share(AtomicU64::new(0)))).collect(),
            unfinished: Line(AtomicUsize::new(0)),
            task: UnsafeCell::new(&|_| {}),
            parked: (0..workers).map(|_| Line(AtomicBool::new(false))).collect(),
            panic: Mutex::new(None),
            panicked: AtomicBool::new(false),
            stop: AtomicBool::new(false),
        });
        // A machine that refuses threads still computes, on those that it gave.
        let workers = (0..workers)
            .map_while(|w| {
                let shared = shared.clone();
                thread::Builder::new()
                    .name(format!("experts-{w}"))
                    .spawn(move || shared.work(w))
                    .ok()
            })
            .collect();
        Pool { shared, workers }
    }

    /// Threads, with the caller.
    pub fn threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Runs `task(0)` to `task(tasks - 1)`, each once, and returns when all are done. While another thread or an
    /// outer task runs a region here, the caller does all of it itself.
    ///
    /// # Panics
    /// With the first panic of a task, after those that run beside it have ended.
    pub fn run(&self, tasks: usize, task: &Task<'_>) {
        assert!(u32::try_from(tasks).is_ok(), "{tasks} tasks");
        let shared = &*self.shared;
        if self.workers.is_empty() || tasks <= 1 || shared.busy.swap(true, Ordering::Acquire) {
            (0..tasks).for_each(task);
            return;
        }
        // SAFETY: only the lifetime changes, and the region ends before this function returns.
        let task = unsafe { std::mem::transmute::<*const Task<'_>, *const Task<'static>>(task) };
        // SAFETY: `busy` makes this the only region, and the last one's tasks are all finished.
        unsafe { *shared.task.get() = task };
        shared.unfinished.0.store(tasks, Ordering::Relaxed);
        let threads = self.threads();
        // The caller, who surely runs, has one of the few that there may be.
        let first = |t: usize| (tasks * t).div_ceil(threads);
        for (t, share) in shared.shares[..threads].iter().enumerate() {
            share.0.give(first(t)..first(t + 1));
        }
        self.wake();
        while shared.run_one(0) {}

        // The others' last tasks: they are short, unless the system took a thread away.
        let mut spins = 0u32;
        while shared.unfinished.0.load(Ordering::Acquire) > 0 {
            spins += 1;
            if spins.is_multiple_of(1 << 12) { thread::yield_now() } else { std::hint::spin_loop() }
        }
        let panic = if shared.panicked.swap(false, Ordering::Relaxed) {
            shared.panic.lock().ok().and_then(|mut panic| panic.take())
        } else {
            None
        };
        shared.busy.store(false, Ordering::Release);
        if let Some(panic) = panic {
            resume_unwind(panic);
        }
    }

    /// As [`Pool::run`], for rows with little to do for each of their `len` values: a task is as many as are worth it.
    pub fn run_rows(&self, rows: usize, len: usize, task: &Task<'_>) {
        let each = (ROW_TASK / len.max(1)).max(1);
        self.run(rows.div_ceil(each), &|t| (t * each..rows.min((t + 1) * each)).for_each(task));
    }

    /// As [`Pool::run_rows`], with `task(i, row)` for each row of `len` values.
    ///
    /// # Panics
    /// Where `values` are not whole rows.
    pub fn for_rows<T: Send>(
        &self,
        values: &mut [T],
        len: usize,
        task: impl Fn(usize, &mut [T]) + Sync,
    ) {
        assert!(values.len().is_multiple_of(len), "{} values in rows of {len}", values.len());
        let (rows, values) = (values.len() / len, SharedMut::new(values));
        // SAFETY: each row is one task's.
        self.run_rows(rows, len, &|row| task(row, unsafe { values.slice(row * len, len) }));
    }

    /// Wakes the workers that are parked.
    fn wake(&self) {
        // Pairs with the fence in `Shared::park`: either the worker sees our tasks, or we see it parked.
        fence(Ordering::SeqCst);
        for (worker, parked) in self.workers.iter().zip(&self.shared.parked) {
            if parked.0.load(Ordering::Relaxed) && parked.0.swap(false, Ordering::Relaxed) {
                worker.thread().unpark();
            }
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        self.wake();
        for worker in self.workers.drain(..) {
            worker.thread().unpark();
            // A worker catches its tasks' panics, so that it has none of its own to report.
            let _ = worker.join();
        }
    }
}

impl Shared {
    /// Worker `w`'s life.
    fn work(&self, w: usize) {
        while !self.stop.load(Ordering::Relaxed) {
            while self.run_one(w + 1) {}
            if !self.spin() {
                self.park(w);
            }
        }
    }

    /// Claims a task of thread `t`'s share, or else of another's, and runs it; false where none is left.
    fn run_one(&self, t: usize) -> bool {
        let (before, rest) = self.shares.split_at(t);
        let mut others = rest[1..].iter().chain(before);
        let claimed = rest[0].0.claim_first();
        let Some(index) = claimed.or_else(|| others.find_map(|share| share.0.claim_last())) else {
            return false;
        };
        // SAFETY: the claim is for the present region, which lasts until its task is counted as finished below.
        let task = unsafe { &**self.task.get() };
        // SAFETY of unwinding: the panic reaches the caller of `run`, whose data the task borrowed.
        if let Err(panic) = catch_unwind(AssertUnwindSafe(|| task(index))) {
            if let Ok(mut first) = self.panic.lock() {
                first.get_or_insert(panic);
            }
            self.panicked.store(true, Ordering::Relaxed);
        }
        self.unfinished.0.fetch_sub(1, Ordering::Release);
        true
    }

    fn any_left(&self) -> bool {
        self.shares.iter().any(|share| !share.0.left().is_empty())
    }

    /// Waits a moment for tasks; true where some came.
    fn spin(&self) -> bool {
        let start = Instant::now();
        loop {
            for _ in 0..64 {
                if self.any_left() {
                    return true;
                }
                std::hint::spin_loop();
            }
            if start.elapsed() > SPIN {
                return false;
            }
            // Whoever waits for the last region's result may be in the queue for this core.
            thread::yield_now();
        }
    }

    /// Sleeps until tasks come.
    fn park(&self, w: usize) {
        let parked = &self.parked[w].0;
        parked.store(true, Ordering::Relaxed);
        fence(Ordering::SeqCst);
        while parked.load(Ordering::Relaxed)
            && !self.any_left()
            && !self.stop.load(Ordering::Relaxed)
        {
            thread::park();
        }
        parked.store(false, Ordering::Relaxed);
    }
}

/// A slice that the tasks of a region write disjoint parts of.
pub(crate) struct SharedMut<'a, T> {
    start: *mut T,
    len: usize,
    life: PhantomData<&'a mut [T]>,
}

// SAFETY: it is a `&mut [T]` whose users promise to touch disjoint parts.
unsafe impl<T: Send> Sync for SharedMut<'_, T> {}

impl<'a, T> SharedMut<'a, T> {
    pub(crate) fn new(slice: &'a mut [T]) -> SharedMut<'a, T> {
        SharedMut { start: slice.as_mut_ptr(), len: slice.len(), life: PhantomData }
    }

    /// `len` elements from `at`.
    ///
    /// # Safety
    /// No two users may hold overlapping parts at once.
    #[allow(clippy::mut_from_ref)]
    pub(crate) unsafe fn slice(&self, at: usize, len: usize) -> &mut [T] {
        assert!(at <= self.len && len <= self.len - at, "{len} elements at {at} of {}", self.len);
        // SAFETY: within the slice, and disjoint from others by the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(at), len) }
    }

    /// Where element `at` is, for writes with a stride.
    pub(crate) fn at(&self, at: usize) -> *mut T {
        assert!(at <= self.len, "element {at} of {}", self.len);
        // SAFETY: within the slice or one past its end.
        unsafe { self.start.add(at) }
    }
}
