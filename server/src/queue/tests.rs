use outrigger_proto::encoding::Decoded;
use outrigger_proto::v1::Encoding;
use tonic::Code;

use super::*;

type Answer = oneshot::Receiver<Result<Sums, Status>>;

fn shared(limit: usize) -> Shared {
    Shared {
        state: Mutex::default(),
        ready: Condvar::new(),
        jobs: AtomicUsize::new(0),
        limit,
        metrics: Arc::new(Metrics::new()),
    }
}

fn work(layer: usize, rows: usize, activations: Decoded) -> Work {
    Work { layer, rows, activations, groups: Vec::new(), reply: Encoding::F32, trace: None }
}

fn job(layer: usize, rows: usize) -> (Job, Answer) {
    let (answer, answered) = oneshot::channel();
    (Job { work: work(layer, rows, Decoded::F32(Vec::new())), answer }, answered)
}

/// The (layer, rows) of the next batch.
fn next(shared: &Shared, max_rows: usize) -> Vec<(usize, usize)> {
    let batch = shared.next_batch(max_rows).expect("the queue is open");
    batch.iter().map(|job| (job.work.layer, job.work.rows)).collect()
}

#[test]
fn a_batch_is_the_oldest_and_its_likes() {
    let shared = shared(100);
    let (jobs, answers): (Vec<_>, Vec<_>) =
        [job(1, 1), job(2, 2), job(1, 3), job(2, 4), job(1, 9)].into_iter().unzip();
    jobs.into_iter().for_each(|job| shared.push(job).unwrap());
    assert_eq!(next(&shared, 10), [(1, 1), (1, 3)], "9 more would be too many");
    assert_eq!(next(&shared, 10), [(2, 2), (2, 4)]);
    assert_eq!(next(&shared, 10), [(1, 9)]);
    assert_eq!(shared.lock().rows, 0);
    drop(answers);
}

#[test]
fn other_forms_of_activations_do_not_mix() {
    let shared = shared(100);
    let (first, _first) = job(1, 1);
    let (mut second, _second) = job(1, 2);
    second.work.activations = Decoded::Q80 { scales: Vec::new(), quants: Vec::new() };
    let (third, _third) = job(1, 3);
    for job in [first, second, third] {
        shared.push(job).unwrap();
    }
    assert_eq!(next(&shared, 10), [(1, 1), (1, 3)]);
    assert_eq!(next(&shared, 10), [(1, 2)]);
}

#[test]
fn what_exceeds_the_limit_is_sent_away_with_a_time_to_return() {
    let shared = shared(10);
    shared.finished(10, Duration::from_millis(50));
    // Larger than the queue, but nothing waits.
    let (large, _large) = job(0, 12);
    shared.push(large).unwrap();
    let (more, _more) = job(0, 1);
    let status = shared.push(more).unwrap_err();
    assert_eq!(status.code(), Code::Unavailable);
    // 12 rows wait, at 5 ms each.
    assert_eq!(status.metadata().get(PUSHBACK).unwrap(), "60");

    assert_eq!(next(&shared, 100), [(0, 12)]);
    let (six, _six) = job(0, 6);
    let (four, _four) = job(0, 4);
    let (one, _one) = job(0, 1);
    shared.push(six).unwrap();
    shared.push(four).unwrap();
    assert_eq!(shared.push(one).unwrap_err().code(), Code::Unavailable);
}

#[test]
fn callers_that_have_gone_are_skipped_and_make_room() {
    let shared = shared(10);
    let (gone, answer) = job(0, 9);
    shared.push(gone).unwrap();
    drop(answer);
    let (waits, _answer) = job(0, 1);
    shared.push(waits).unwrap();
    assert_eq!(next(&shared, 100), [(0, 1)]);
    let (fits, _answer) = job(0, 10);
    shared.push(fits).unwrap();
}

#[test]
fn a_closed_queue_gives_out_what_it_has_and_takes_nothing() {
    let shared = shared(10);
    let (waits, _answer) = job(0, 1);
    shared.push(waits).unwrap();
    shared.close();
    let (late, _late) = job(0, 1);
    assert_eq!(shared.push(late).unwrap_err().code(), Code::Internal);
    assert_eq!(next(&shared, 10), [(0, 1)]);
    assert!(shared.next_batch(10).is_none());
}

#[test]
fn a_sleeping_thread_is_woken() {
    let shared = Arc::new(shared(10));
    let thread = thread::spawn({
        let shared = shared.clone();
        move || next(&shared, 10)
    });
    while !shared.lock().asleep {
        thread::yield_now();
    }
    let (waits, _answer) = job(3, 1);
    shared.push(waits).unwrap();
    assert_eq!(thread.join().unwrap(), [(3, 1)]);
}
