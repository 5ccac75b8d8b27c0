//! Fork and join over a fixed set of threads, made for regions of some tens of microseconds.
//!
//! Tasks are claimed one by one from a counter, so that a thread that the system took away costs the others only the
//! task that it holds. Between regions the workers spin for a moment, since the next region of a token follows soon;
//! then they park. A region takes no lock and allocates nothing.

use std::any::Any;
use std::cell::UnsafeCell;
use std::marker::PhantomData;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering, fence};
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
    /// Tasks of the region that nobody has claimed yet. Claiming takes the last.
    unclaimed: Line<AtomicUsize>,
    /// Tasks of the region that are not finished yet.
    unfinished: Line<AtomicUsize>,
    /// The region: written while `unclaimed` is 0 and nobody runs a task; read only by who claimed one.
    region: UnsafeCell<Region>,
    parked: Box<[Line<AtomicBool>]>,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
    panicked: AtomicBool,
    stop: AtomicBool,
}

/// A cache line of its own.
#[repr(align(128))]
struct Line<T>(T);

struct Region {
    task: *const Task<'static>,
    tasks: usize,
}

// SAFETY: `region` is the only part that is not Sync by itself. It is written between regions only, by the thread
// that set `busy`, before `unclaimed` is raised (release), and read after a successful claim (acquire). The task
// that it points to is Sync and outlives the region, since `run` returns only when `unfinished` is 0.
unsafe impl Sync for Shared {}
// SAFETY: as above; the pointer is used by any thread.
unsafe impl Send for Shared {}

impl Pool {
    /// A pool of `threads` threads, of which the caller is one: with 1, everything runs on the caller.
    pub fn new(threads: usize) -> Pool {
        let workers = threads.max(1) - 1;
        let shared = Arc::new(Shared {
            busy: AtomicBool::new(false),
            unclaimed: Line(AtomicUsize::new(0)),
            unfinished: Line(AtomicUsize::new(0)),
            region: UnsafeCell::new(Region { task: &|_| {}, tasks: 0 }),
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
    /// With the first panic of a task, after all have ended.
    pub fn run(&self, tasks: usize, task: &Task<'_>) {
        let shared = &*self.shared;
        if self.workers.is_empty() || tasks <= 1 || shared.busy.swap(true, Ordering::Acquire) {
            (0..tasks).for_each(task);
            return;
        }
        // SAFETY: only the lifetime changes, and the region ends before this function returns.
        let task = unsafe { std::mem::transmute::<*const Task<'_>, *const Task<'static>>(task) };
        // SAFETY: `busy` makes this the only region, and the last one's tasks are all finished.
        unsafe { *shared.region.get() = Region { task, tasks } };
        shared.unfinished.0.store(tasks, Ordering::Relaxed);
        shared.unclaimed.0.store(tasks, Ordering::Release);
        self.wake();
        while shared.run_one() {}

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
            while self.run_one() {}
            if !self.spin() {
                self.park(w);
            }
        }
    }

    /// Claims a task and runs it; false where none is left.
    fn run_one(&self) -> bool {
        let mut left = self.unclaimed.0.load(Ordering::Relaxed);
        loop {
            if left == 0 {
                return false;
            }
            let claim = self.unclaimed.0.compare_exchange_weak(
                left,
                left - 1,
                Ordering::Acquire,
                Ordering::Relaxed,
            );
            match claim {
                Ok(_) => break,
                Err(now) => left = now,
            }
        }
        // SAFETY: the claim is for the present region, which lasts until its task is counted as finished below.
        let (task, tasks) = unsafe { (&*(*self.region.get()).task, (*self.region.get()).tasks) };
        // SAFETY of unwinding: the panic reaches the caller of `run`, whose data the task borrowed.
        if let Err(panic) = catch_unwind(AssertUnwindSafe(|| task(tasks - left))) {
            if let Ok(mut first) = self.panic.lock() {
                first.get_or_insert(panic);
            }
            self.panicked.store(true, Ordering::Relaxed);
        }
        self.unfinished.0.fetch_sub(1, Ordering::Release);
        true
    }

    /// Waits a moment for tasks; true where some came.
    fn spin(&self) -> bool {
        let start = Instant::now();
        loop {
            for _ in 0..64 {
                if self.unclaimed.0.load(Ordering::Relaxed) > 0 {
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
            && self.unclaimed.0.load(Ordering::Relaxed) == 0
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
