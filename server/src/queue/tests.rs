use std::path::Path;

use outrigger_experts::Model;
use outrigger_proto::encoding::Decoded;
use outrigger_proto::v1::Encoding;
use tonic::Code;

use super::*;
use crate::ServerConfig;
use crate::request::ExpertRows;
use crate::shard::Shard;

type Answer = oneshot::Receiver<Result<Sums, Status>>;

fn shared(rows: usize) -> Shared {
    let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/demo.gguf");
    let config = ServerConfig { threads: 1, ..ServerConfig::default() };
    let metrics = Arc::new(Metrics::new());
    let shard = Shard::new(Arc::new(Model::open(&model).unwrap()), &config).unwrap();
    let engine = Engine::new(&shard, &config, metrics.clone()).unwrap();
    let limits = Limits { rows, batch_rows: 100, wait: Duration::from_secs(1) };
    Shared::new(engine, limits, metrics)
}

fn work(layer: usize, rows: usize) -> Work {
    let activations = Decoded::F32(vec![0.5; rows * 256]);
    let groups = vec![ExpertRows { expert: 3, rows: vec![(0, 1.0)] }];
    Work { layer, rows, activations, groups, reply: Encoding::F32, device: 0, trace: None }
}

fn job(layer: usize, rows: usize) -> (Job, Answer) {
    let (answer, answered) = oneshot::channel();
    (Job { work: work(layer, rows), answer }, answered)
}

/// The (layer, rows) of the next batch.
fn next(shared: &Shared) -> Vec<(usize, usize)> {
    let batch = shared.next_batch().expect("the queue is open");
    batch.iter().map(|job| (job.work.layer, job.work.rows)).collect()
}

#[test]
fn what_exceeds_the_limit_is_sent_away_with_a_time_to_return() {
    let shared = shared(10);
    shared.lock().schedule.ended(Instant::now(), 0, vec![0], 10, Duration::from_millis(50));
    // Larger than the queue, but nothing waits.
    let (large, _large) = job(0, 12);
    shared.push(large).unwrap();
    let (more, _more) = job(0, 1);
    let status = shared.push(more).unwrap_err();
    assert_eq!(status.code(), Code::Unavailable);
    // 12 rows wait, at 5 ms each.
    assert_eq!(status.metadata().get(PUSHBACK).unwrap(), "60");

    assert_eq!(next(&shared), [(0, 12)]);
    let (six, _six) = job(0, 6);
    let (four, _four) = job(0, 4);
    let (one, _one) = job(0, 1);
    shared.push(six).unwrap();
    shared.push(four).unwrap();
    assert_eq!(shared.push(one).unwrap_err().code(), Code::Unavailable);
}

#[test]
fn what_would_wait_too_long_is_sent_away() {
    let shared = shared(100);
    shared.lock().schedule.ended(Instant::now(), 0, vec![0], 1, Duration::from_millis(300));
    let (three, _three) = job(0, 3);
    shared.push(three).unwrap();
    let (one, _one) = job(0, 1);
    let status = shared.push(one).unwrap_err();
    assert_eq!(status.code(), Code::Unavailable);
    assert_eq!(status.metadata().get(PUSHBACK).unwrap(), "900");
}

#[test]
fn callers_that_have_gone_are_skipped_and_make_room() {
    let shared = shared(10);
    let (gone, answer) = job(0, 9);
    shared.push(gone).unwrap();
    drop(answer);
    let (waits, _answer) = job(0, 1);
    shared.push(waits).unwrap();
    assert_eq!(next(&shared), [(0, 1)]);
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
    assert!(shared.run_at_once(&work(0, 1)).is_none());
    assert_eq!(next(&shared), [(0, 1)]);
    assert!(shared.next_batch().is_none());
}

#[test]
fn a_sleeping_thread_is_woken() {
    let shared = Arc::new(shared(10));
    let thread = thread::spawn({
        let shared = shared.clone();
        move || {
            shared.wait_for_requests();
            next(&shared)
        }
    });
    while shared.lock().thread != Thread::Asleep {
        thread::yield_now();
    }
    let (waits, _answer) = job(3, 1);
    shared.push(waits).unwrap();
    assert_eq!(thread.join().unwrap(), [(3, 1)]);
}

#[test]
fn a_lone_request_is_computed_where_it_is() {
    let shared = shared(10);
    let alone = shared.run_at_once(&work(1, 1)).expect("nothing else is to be done").unwrap();
    assert!(alone.bytes.iter().any(|byte| *byte != 0));

    let other = Work { device: 1, ..work(1, 1) };
    assert!(shared.run_at_once(&other).is_none(), "another device was here before");
    assert!(shared.run_at_once(&other).is_some(), "it has the server to itself now");
    assert!(shared.run_at_once(&work(1, 1)).is_none(), "the other one was here before");

    let (waits, _answer) = job(1, 1);
    shared.push(waits).unwrap();
    assert!(shared.run_at_once(&work(1, 1)).is_none(), "another waits");
    assert_eq!(next(&shared), [(1, 1)]);

    let engine = shared.engine.lock().unwrap();
    assert!(shared.run_at_once(&work(1, 1)).is_none(), "another is computed");
    drop(engine);

    shared.lock().schedule.ended(Instant::now(), 1, vec![0, 1], 2, Duration::from_micros(10));
    assert!(shared.run_at_once(&work(1, 1)).is_none(), "several devices are about");

    shared.lock().schedule.ended(Instant::now(), 1, vec![0], 1, Duration::from_secs(1));
    assert!(shared.run_at_once(&work(1, 1)).is_none(), "it would take long");
}
