//! Random faults of the network and the server, many times over, on a simulated network.
//!
//! Two apps share a device. One goes on whatever happens, as a chat does; the other insists on the full model's text, and
//! asks for a token again until nothing is missing. Safety is checked at each token of both, liveness once a fault is
//! over. `OUTRIGGER_SEEDS=0-999` chooses the seeds; what fails names its own.

use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use outrigger::simulate::Network;
use outrigger::{Budget, Dial, Elsewhere, Engine, EngineConfig, Policy, Session, Token};
use outrigger_tests::reference::{Missing, Reference};
use outrigger_tests::schedule::Schedule;
use outrigger_tests::simulated::{DEADLINE, PACE};
use outrigger_tests::{fixtures, greedy, max_difference};
use tokio::time::Instant;
use tracing::field::{Field, Visit};
use tracing_subscriber::Layer;
use tracing_subscriber::layer::{Context, SubscriberExt};

/// Once a fault is over, everything is well again within this time.
const RECOVERY: Duration = Duration::from_secs(2);
/// What the simulation's clock ticks add to a deadline.
const TICKS: Duration = Duration::from_millis(5);
/// Logits of two sites that add the same numbers up.
const TOLERANCE: f32 = 1e-5;
const PROMPT: [u32; 5] = [18, 139, 71, 65, 125];

/// One token as the device saw it.
struct Seen {
    asked: Duration,
    token: Token,
}

/// A token that the strict app asked for, behind settled history.
struct Attempt {
    seen: Seen,
    /// The text up to the token.
    ids: Vec<u32>,
    /// How much of it was settled before.
    settled: usize,
    /// What the device says that it missed.
    missing: Missing,
    logits: Vec<f32>,
}

/// What a run left.
struct Run {
    chat: Vec<Seen>,
    strict: Vec<Attempt>,
    /// The chat's text at the end, all settled, and the logits after it.
    settled: (Vec<u32>, Vec<f32>),
}

async fn live(dial: Dial, model: &Path, length: Duration) -> Run {
    let log = MissingLog::default();
    let _guard = tracing::subscriber::set_default(tracing_subscriber::registry().with(log.clone()));
    let epoch = Instant::now();
    let mut config = EngineConfig::new(model);
    config.servers = vec![Network::SERVER.to_owned()];
    config.expert_cache = Budget::Fraction(0.25);
    config.elsewhere = Elsewhere::Absent;
    config.policy = Policy::LeaveOut;
    config.deadline = DEADLINE;
    config.threads = 1;
    config.dial = dial;
    let engine = Engine::open(config).await.expect("the model opens");
    let (mut chat, mut strict) = (begin(&engine), begin(&engine));
    let (mut said, mut attempts) = (Vec::new(), Vec::new());
    while epoch.elapsed() < length {
        for session in [&mut chat, &mut strict] {
            if session.len() + 1 >= engine.context() {
                *session = begin(&engine);
            }
        }
        let asked = epoch.elapsed();
        said.push(Seen { asked, token: chat.step().await.expect("it goes on") });
        attempts.push(attempt(&mut strict, &log, epoch).await);
        tokio::time::sleep(PACE).await;
    }
    chat.settle().await.expect("it settles");
    // The last token is pending: nothing was computed for it yet.
    assert_eq!(chat.settled() + 1, chat.len(), "the fault is over");
    let ids: Vec<u32> = chat.tokens().take(chat.settled()).collect();
    Run { chat: said, strict: attempts, settled: (ids, chat.logits().to_vec()) }
}

fn begin(engine: &Arc<Engine>) -> Session {
    let mut session = greedy(engine);
    session.push(&PROMPT).expect("it fits");
    session
}

/// Takes a step, and takes it back unless nothing was missing.
async fn attempt(strict: &mut Session, log: &MissingLog, epoch: Instant) -> Attempt {
    let (ids, settled): (Vec<u32>, usize) = (strict.tokens().collect(), strict.settled());
    let asked = epoch.elapsed();
    log.take();
    let token = strict.step().await.expect("it goes on");
    let logits = strict.logits().to_vec();
    if token.provisional {
        strict.truncate(strict.settled());
        strict.push(&ids[strict.settled()..]).expect("it fitted before");
    }
    Attempt { seen: Seen { asked, token }, ids, settled, missing: log.take(), logits }
}

/// Collects what the device logs about missing experts.
#[derive(Clone, Default)]
struct MissingLog(Arc<Mutex<Missing>>);

impl MissingLog {
    fn take(&self) -> Missing {
        std::mem::take(&mut *self.0.lock().expect("nothing panics under this lock"))
    }
}

impl<S: tracing::Subscriber> Layer<S> for MissingLog {
    fn on_event(&self, event: &tracing::Event<'_>, _: Context<'_, S>) {
        let mut fields = Fields::default();
        event.record(&mut fields);
        if fields.0.get("message").is_some_and(|message| message == "missing") {
            let layer = fields.0["layer"].parse().expect("a number");
            let experts = serde_json::from_str(&fields.0["experts"]).expect("a list of numbers");
            self.0.lock().expect("nothing panics under this lock").insert(layer, experts);
        }
    }
}

#[derive(Default)]
struct Fields(BTreeMap<&'static str, String>);

impl Visit for Fields {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.0.insert(field.name(), format!("{value:?}"));
    }
}

/// At each token: within its deadline, and marked where and only where something is missing.
fn check_marks(seen: &Seen) {
    let Seen { asked, token } = seen;
    assert!(token.elapsed <= DEADLINE + TICKS, "at {asked:?}: {token:?}");
    assert_eq!(token.coverage == 1.0, token.tally.missing == 0, "at {asked:?}: {token:?}");
    assert_eq!(token.fault.is_some(), token.tally.missing > 0, "at {asked:?}: {token:?}");
    assert!(token.provisional || token.coverage == 1.0, "at {asked:?}: {token:?}");
}

/// Whole wherever no fault was on within the time to recover, and as fast as before the first.
fn check_liveness(schedule: &Schedule, seen: &[&Seen]) {
    let calm = |seen: &&&Seen| {
        let from = seen.asked.saturating_sub(RECOVERY);
        !schedule.disturbed(from, seen.asked + seen.token.elapsed)
    };
    for Seen { asked, token } in seen.iter().filter(calm) {
        assert_eq!(token.coverage, 1.0, "at {asked:?}: {token:?}");
    }
    let mean = |tokens: &[&&Seen]| {
        assert!(tokens.len() > 5, "tokens go on");
        tokens.iter().map(|seen| seen.token.elapsed).sum::<Duration>() / tokens.len() as u32
    };
    let first = schedule.faults.iter().map(|timed| timed.from).min().expect("a fault");
    let before: Vec<_> =
        seen.iter().filter(|seen| seen.asked + seen.token.elapsed < first).skip(2).collect();
    let after: Vec<_> = seen.iter().filter(|s| s.asked > schedule.end() + RECOVERY).collect();
    let (before, after) = (mean(&before), mean(&after));
    assert!(after <= before * 3 / 2, "{before:?} a token before, {after:?} after");
}

/// Nothing but the model's own numbers was merged: each attempt of the strict app has the logits and the coverage of the
/// same rows without what it missed.
async fn check_numbers(reference: &mut Reference, run: &Run) {
    for Attempt { seen, ids, settled, missing, logits } in &run.strict {
        let expected = reference.pass(ids, *settled, missing).await;
        let difference = max_difference(logits, &expected.logits);
        assert!(difference <= TOLERANCE, "at {:?}: {difference}, missing {missing:?}", seen.asked);
        assert!((seen.token.coverage - expected.coverage).abs() < 1e-5, "at {:?}", seen.asked);
    }
    let (ids, logits) = &run.settled;
    let expected = reference.pass(ids, 0, &Missing::new()).await;
    let difference = max_difference(logits, &expected.logits);
    assert!(difference <= TOLERANCE, "{difference} at the end");
}

fn seeds() -> std::ops::RangeInclusive<u64> {
    let text = std::env::var("OUTRIGGER_SEEDS").unwrap_or_else(|_| "0-49".to_owned());
    let (first, last) = text.split_once('-').unwrap_or((&text, &text));
    let number = |text: &str| text.parse().expect("OUTRIGGER_SEEDS: expected a seed or 0-49");
    number(first)..=number(last)
}

#[test]
fn random_faults_break_nothing_that_is_promised() {
    static PANICS: AtomicUsize = AtomicUsize::new(0);
    let report = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        PANICS.fetch_add(1, Ordering::Relaxed);
        report(panic);
    }));
    let directory = tempfile::tempdir().expect("a temporary directory");
    let (model, other) = (fixtures::tiny_model("olmoe"), fixtures::other_model(directory.path()));
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    let mut reference = runtime.block_on(Reference::start(&model));
    let (mut tokens, mut degraded, mut mixed, mut longest) = (0, 0, 0, Duration::ZERO);
    for seed in seeds() {
        let schedule = Schedule::random(seed);
        // Only shown where something fails.
        println!("OUTRIGGER_SEEDS={seed}: {:#?}", schedule.faults);
        let length = schedule.end() + 2 * RECOVERY;
        let network = schedule.network(&model, &other);
        let run = network.run(|dial| live(dial, &model, length)).expect("the server runs");
        let strict: Vec<&Seen> = run.strict.iter().map(|attempt| &attempt.seen).collect();
        for seen in [run.chat.iter().collect(), strict] {
            seen.iter().for_each(|seen| check_marks(seen));
            check_liveness(&schedule, &seen);
            tokens += seen.len();
            longest = seen.iter().map(|seen| seen.token.elapsed).fold(longest, Duration::max);
        }
        runtime.block_on(check_numbers(&mut reference, &run));
        assert_eq!(PANICS.load(Ordering::Relaxed), 0, "a task panicked");
        degraded += run.strict.iter().filter(|attempt| attempt.seen.token.coverage < 1.0).count();
        let partly = |attempt: &&Attempt| {
            attempt.seen.token.coverage < 1.0 && attempt.seen.token.tally.remote > 0
        };
        mixed += run.strict.iter().filter(partly).count();
    }
    println!(
        "{tokens} tokens, the longest {longest:?}; {degraded} degraded ones compared, {mixed} of \
         them with some of the server's sums"
    );
    assert!(degraded > 0 && mixed > 0, "the faults show");
}
