//! The fork-join pool: every task once, whoever calls, whatever panics.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use outrigger_experts::Pool;

/// Runs a region and checks that each task ran once.
fn each_once(pool: &Pool, tasks: usize) {
    let runs: Vec<AtomicUsize> = (0..tasks).map(|_| AtomicUsize::new(0)).collect();
    pool.run(tasks, &|i| {
        runs[i].fetch_add(1, Ordering::Relaxed);
    });
    assert!(runs.iter().all(|n| n.load(Ordering::Relaxed) == 1), "{runs:?}");
}

#[test]
fn every_task_runs_once_in_region_after_region() {
    for threads in [0, 1, 2, 3, 8] {
        let pool = Pool::new(threads);
        assert_eq!(pool.threads(), threads.max(1));
        for region in 0..2000 {
            each_once(&pool, region % 23);
        }
    }
}

#[test]
fn every_row_is_one_tasks_however_short_and_many_they_are() {
    let pool = Pool::new(3);
    for (rows, len) in [(0, 4), (1, 1), (1000, 1), (3, 20_000), (5, 16 << 10), (40_000, 3)] {
        let mut values = vec![0; rows * len];
        pool.for_rows(&mut values, len, |i, row| row.iter_mut().for_each(|value| *value += i + 1));
        for (i, row) in values.chunks(len).enumerate() {
            assert!(row.iter().all(|value| *value == i + 1), "row {i} of {rows} by {len}");
        }
    }
}

#[test]
fn parked_workers_wake() {
    let pool = Pool::new(3);
    for _ in 0..20 {
        std::thread::sleep(Duration::from_millis(2));
        // Each task waits for the others, so that every thread has to come.
        let (arrived, begun) = (AtomicUsize::new(0), Instant::now());
        pool.run(3, &|_| {
            arrived.fetch_add(1, Ordering::SeqCst);
            while arrived.load(Ordering::SeqCst) < 3 {
                assert!(begun.elapsed() < Duration::from_secs(20), "a worker sleeps");
                std::thread::yield_now();
            }
        });
    }
}

#[test]
fn workers_take_part() {
    let pool = Pool::new(2);
    let seen = std::sync::Mutex::new(std::collections::HashSet::new());
    // Each task waits for the other: one thread alone would never end.
    let arrived = AtomicUsize::new(0);
    pool.run(2, &|_| {
        arrived.fetch_add(1, Ordering::SeqCst);
        while arrived.load(Ordering::SeqCst) < 2 {
            std::thread::yield_now();
        }
        seen.lock().unwrap().insert(std::thread::current().id());
    });
    assert_eq!(seen.lock().unwrap().len(), 2);
}

/// A thread that is held up holds up its task alone: the first of its share waits for all tasks of the region but itself.
#[test]
fn others_take_over_the_share_of_a_thread_that_is_held() {
    let pool = Pool::new(2);
    for held in [0, 20] {
        let done = AtomicUsize::new(0);
        pool.run(40, &|i| {
            while i == held && done.load(Ordering::SeqCst) < 39 {
                std::thread::yield_now();
            }
            done.fetch_add(1, Ordering::SeqCst);
        });
        assert_eq!(done.load(Ordering::SeqCst), 40);
    }
}

/// What a thread reads next lies behind what it read: it runs its tasks in order, but for those that it takes over.
#[test]
fn a_thread_alone_with_its_share_runs_it_in_order() {
    let pool = Pool::new(2);
    let order = std::sync::Mutex::new(Vec::new());
    let caller = std::thread::current().id();
    pool.run(40, &|i| {
        if std::thread::current().id() == caller {
            order.lock().unwrap().push(i);
        }
    });
    let order = order.into_inner().unwrap();
    let (own, taken): (Vec<usize>, Vec<usize>) = order.iter().partition(|i| **i < 20);
    assert!(own.is_sorted() && taken.is_sorted_by(|a, b| a > b), "{order:?}");
    assert!(order.iter().take(own.len()).eq(&own), "{order:?}");
}

#[test]
fn a_panic_reaches_the_caller_after_the_other_tasks_and_the_pool_goes_on() {
    let pool = Pool::new(3);
    for bad in [0, 17, 39] {
        let done = AtomicUsize::new(0);
        let result = catch_unwind(AssertUnwindSafe(|| {
            pool.run(40, &|i| {
                assert!(i != bad, "task {i} fails");
                done.fetch_add(1, Ordering::Relaxed);
            });
        }));
        let message = *result.unwrap_err().downcast::<String>().unwrap();
        assert_eq!(message, format!("task {bad} fails"));
        assert_eq!(done.load(Ordering::Relaxed), 39);
        each_once(&pool, 40);
    }
}

#[test]
fn callers_at_once_and_nested_regions_all_finish() {
    let pool = Pool::new(2);
    let total = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                for _ in 0..200 {
                    pool.run(7, &|_| {
                        pool.run(3, &|_| {
                            total.fetch_add(1, Ordering::Relaxed);
                        });
                    });
                }
            });
        }
    });
    assert_eq!(total.load(Ordering::Relaxed), 4 * 200 * 7 * 3);
}
