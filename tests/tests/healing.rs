//! Healing in the background: random cuts, after which a session is as if it had never been cut, and says where the
//! full model would first have said something else.

use std::cell::Cell;
use std::future::{Future, poll_fn};
use std::pin::pin;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use outrigger::{
    Budget, Elsewhere, Engine, EngineConfig, Sampler, SamplerConfig, Session, Tally, Token,
};
use outrigger_server::ServerConfig;
use outrigger_tests::loopback::LoopbackServer;
use outrigger_tests::{all_logits, fixtures, max_difference};
use proptest::prelude::*;
use proptest::test_runner::{Config, RngAlgorithm, TestRng, TestRunner};

/// Tokens without the server, then tokens with it, then tokens that the user adds.
type Cut = (usize, usize, Vec<u32>);

async fn whole_engine() -> Arc<Engine> {
    Engine::open(EngineConfig::new(fixtures::demo_model())).await.expect("it opens")
}

/// A device that holds a fraction of the experts, and a server.
async fn split_engine(server: &LoopbackServer, here: f64) -> Arc<Engine> {
    let mut config = EngineConfig::new(fixtures::demo_model());
    config.servers = vec![server.address.to_string()];
    config.expert_cache = Budget::Fraction(here);
    config.elsewhere = Elsewhere::Absent;
    // Far beyond what a busy machine makes of a call on loopback.
    config.deadline = Duration::from_secs(20);
    let engine = Engine::open(config).await.expect("it opens");
    assert!(engine.wait_connected(Duration::from_secs(5)).await, "the server is up");
    engine
}

/// Ends a cut. A busy machine may have taken the link down besides: then it comes back first.
async fn reconnect(engine: &Engine) {
    engine.set_offline(false);
    assert!(engine.wait_connected(Duration::from_secs(20)).await, "the server is up");
}

/// Settles all of a session, even if a busy machine makes an answer late.
async fn settle(engine: &Engine, session: &mut Session) {
    for _ in 0..10 {
        reconnect(engine).await;
        session.settle().await.expect("it settles");
        if session.settled() == session.len() {
            return;
        }
    }
    panic!("{} of {} tokens are settled", session.settled(), session.len());
}

/// A session, and what a test must know of it.
struct Timeline {
    engine: Arc<Engine>,
    session: Session,
    sampler: SamplerConfig,
    /// Tokens that wait for the next pass.
    pending: usize,
    /// The positions of what was sampled.
    said: Vec<usize>,
}

impl Timeline {
    fn start(engine: &Arc<Engine>, sampler: SamplerConfig) -> Timeline {
        let session = engine.session(sampler.clone()).expect("the sampler is valid");
        let mut timeline =
            Timeline { engine: engine.clone(), session, sampler, pending: 0, said: Vec::new() };
        timeline.push(&engine.tokenizer().encode("It was the best of times", true, true));
        timeline
    }

    fn push(&mut self, tokens: &[u32]) {
        self.session.push(tokens).expect("it fits");
        self.pending += tokens.len();
    }

    /// Takes steps, none of which may compute more rows than were pending and may be healed.
    async fn steps(&mut self, count: usize) -> Vec<Token> {
        let mut tokens = Vec::new();
        for _ in 0..count {
            self.said.push(self.session.len());
            let token = self.session.step().await.expect("a token");
            let computed = rows(&self.engine, &token.tally);
            assert!(computed <= self.pending + Session::HEAL_ROWS, "{token:?}");
            assert!(token.healed <= computed - self.pending, "{token:?}");
            assert_eq!(token.provisional, !self.is_settled(), "{token:?}");
            assert_eq!(token.divergence, self.session.divergence());
            self.pending = 1;
            tokens.push(token);
        }
        tokens
    }

    fn is_settled(&self) -> bool {
        self.session.settled() + 1 == self.session.len()
    }

    /// Steps until everything that was said is settled; each heals at most `HEAL_ROWS` and adds one.
    async fn heal(&mut self) {
        reconnect(&self.engine).await;
        let tail = self.session.len() - self.session.settled();
        // One step to learn that nothing is missing any more.
        let enough = 1 + tail.div_ceil(Session::HEAL_ROWS - 1);
        let (mut steps, mut faults) = (0, 0);
        while !self.is_settled() {
            assert!(
                steps < enough && faults < 10,
                "a tail of {tail}: {steps} steps, {faults} faults"
            );
            match self.steps(1).await.remove(0).fault {
                None => steps += 1,
                // A late answer costs this step and the next, and what they add.
                Some(_) => {
                    (faults, steps) = (faults + 1, steps.saturating_sub(2));
                    reconnect(&self.engine).await;
                }
            }
        }
    }

    /// Logits are those of the full model, and the divergence is what a naive replay says.
    async fn check(&self, whole: &Arc<Engine>) {
        let ids: Vec<u32> = self.session.tokens().collect();
        let vocab = whole.spec().n_vocab;
        let expected = all_logits(whole, &ids[..ids.len() - 1], 512).await;
        let last = &expected[expected.len() - vocab..];
        let difference = max_difference(self.session.logits(), last);
        assert!(difference <= 1e-4, "{difference}");

        let mut sampler = Sampler::new(self.sampler.clone());
        let mut would_say = |at: usize| {
            let logits = &expected[(at - 1) * vocab..at * vocab];
            sampler.sample(logits, &ids[..at])
        };
        let naive = self.said.iter().copied().find(|&at| would_say(at) != ids[at]);
        assert_eq!(self.session.divergence(), naive);
    }
}

/// Rows of the passes that a tally counts: every routed call of a row is somewhere in it.
fn rows(engine: &Engine, tally: &Tally) -> usize {
    let calls = tally.local + tally.remote + tally.missing;
    calls as usize / (engine.spec().n_layers * engine.spec().n_used)
}

fn cuts() -> impl Strategy<Value = Vec<Cut>> {
    let pushed = prop_oneof![
        2 => Just(Vec::new()),
        1 => prop::collection::vec(0..4000_u32, 1..40),
    ];
    prop::collection::vec((1..25_usize, 0..8_usize, pushed), 1..4)
}

fn samplers() -> impl Strategy<Value = SamplerConfig> {
    let temperature = prop_oneof![Just(0.0), Just(0.8_f32)];
    let penalty = prop_oneof![Just(1.0), Just(1.3_f32)];
    (temperature, penalty, any::<u64>()).prop_map(|(temperature, repeat_penalty, seed)| {
        SamplerConfig { temperature, repeat_penalty, seed, ..SamplerConfig::default() }
    })
}

#[test]
fn after_random_cuts_stepping_on_heals() {
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    let (whole, server) = runtime.block_on(async {
        (whole_engine().await, LoopbackServer::start(&fixtures::demo_model(), None).await)
    });
    let diverged = Cell::new(0);
    let config = Config { cases: 16, failure_persistence: None, ..Config::default() };
    let rng = TestRng::deterministic_rng(RngAlgorithm::ChaCha);
    let mut runner = TestRunner::new_with_rng(config, rng);
    // With most experts here, what is said agrees with the full model for a while.
    let here = prop_oneof![Just(0.25), Just(0.9)];
    let outcome = runner.run(&(here, cuts(), samplers()), |(here, cuts, sampler)| {
        runtime.block_on(async {
            let engine = split_engine(&server, here).await;
            let mut timeline = Timeline::start(&engine, sampler);
            for (offline, online, pushed) in cuts {
                engine.set_offline(true);
                timeline.steps(offline).await;
                reconnect(&engine).await;
                timeline.steps(online).await;
                timeline.push(&pushed);
            }
            // Another way to the same: all at once.
            let mut fork = timeline.session.fork();
            timeline.heal().await;
            timeline.check(&whole).await;
            fork.advance().await.expect("a pass");
            settle(&engine, &mut fork).await;
            let met = timeline.session.divergence().filter(|at| *at < fork.len());
            assert_eq!(fork.divergence(), met, "the fork said less, but nothing else");
            diverged.set(diverged.get() + u32::from(met.is_some()));
        });
        Ok(())
    });
    outcome.expect("every case holds");
    assert!(diverged.get() > 0, "in some case the cut changes what is said");
}

// One thread: the server answers between polls only, so that each is one layer at most.
#[tokio::test]
async fn a_step_that_is_dropped_while_it_heals_costs_nothing() {
    let (whole, server) =
        (whole_engine().await, LoopbackServer::start(&fixtures::demo_model(), None).await);
    let engine = split_engine(&server, 0.25).await;
    let mut timeline = Timeline::start(&engine, SamplerConfig::greedy());
    engine.set_offline(true);
    timeline.steps(20).await;
    reconnect(&engine).await;
    timeline.steps(2).await;
    let before = (timeline.session.settled(), timeline.session.tokens().collect::<Vec<_>>());
    for polls in [1, 2, 4] {
        reconnect(&engine).await;
        assert!(polled(polls, timeline.session.step()).await.is_none(), "it has more layers");
        let after = (timeline.session.settled(), timeline.session.tokens().collect::<Vec<_>>());
        assert_eq!(after, before);
    }
    timeline.heal().await;
    timeline.check(&whole).await;
}

/// Polls a future so many times and drops it, unless it is ready.
async fn polled<F: Future>(times: u32, future: F) -> Option<F::Output> {
    let mut future = pin!(future);
    let mut left = times;
    poll_fn(|context| {
        if left == 0 {
            return Poll::Ready(None);
        }
        left -= 1;
        future.as_mut().poll(context).map(Some)
    })
    .await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn batches_of_a_prompt_heal_too_and_are_no_larger_than_the_server_takes() {
    let whole = whole_engine().await;
    let config = ServerConfig { max_rows: 20, ..LoopbackServer::config(&fixtures::demo_model()) };
    let server = LoopbackServer::start_with(config, None).await;
    let engine = split_engine(&server, 0.25).await;
    let mut timeline = Timeline::start(&engine, SamplerConfig::greedy());
    engine.set_offline(true);
    timeline.steps(30).await;
    reconnect(&engine).await;
    let settled = timeline.session.settled();
    let prompt: Vec<u32> = (0..100).map(|i| i * 37 % 4000).collect();
    timeline.push(&prompt);
    let mut logits = Vec::new();
    let show = |rows: &[f32]| logits.extend_from_slice(rows);
    let pass = timeline.session.advance_all(show).await.expect("a pass");
    assert_eq!(pass.fault, None, "no request has more rows than the server takes");
    assert!(timeline.session.settled() >= settled + 4 * Session::HEAL_ROWS, "batch after batch");
    // The pass is about what was pending: the last token that was said, and the prompt.
    assert_eq!(pass.rows(), prompt.len() + 1);
    assert_eq!(logits.len(), pass.rows() * engine.spec().n_vocab);
    settle(&engine, &mut timeline.session).await;
    timeline.push(&[0]);
    timeline.check(&whole).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_is_healed_in_vain() {
    // It answers, but has too few experts for anything to be exact.
    let server = LoopbackServer::start(&fixtures::demo_model(), Some(0..=1)).await;
    let engine = split_engine(&server, 0.25).await;
    let mut timeline = Timeline::start(&engine, SamplerConfig::greedy());
    let mut tokens = timeline.steps(20).await;
    let prompt = tokens.remove(0);
    assert!(prompt.tally.missing > 0 && timeline.session.settled() == 0, "{prompt:?}");
    let mut missed = true;
    for token in tokens {
        let computed = rows(&engine, &token.tally);
        assert!(!missed || computed == 1, "after a pass that missed something: {token:?}");
        missed = token.tally.missing > 0;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_divergence_goes_with_its_token() {
    let server = LoopbackServer::start(&fixtures::demo_model(), None).await;
    let engine = split_engine(&server, 0.25).await;
    let mut timeline = Timeline::start(&engine, SamplerConfig::greedy());
    engine.set_offline(true);
    timeline.steps(40).await;
    assert_eq!(timeline.session.divergence(), None, "nobody knows yet");
    timeline.heal().await;
    let at = timeline.session.divergence().expect("forty tokens with a quarter of the experts");

    let (mut kept, mut cut) = (timeline.session.fork(), timeline.session.fork());
    kept.truncate(at + 1);
    assert_eq!(kept.divergence(), Some(at));
    cut.truncate(at);
    assert_eq!(cut.divergence(), None);

    // What the user says is never a divergence, even where the model would have said something else.
    let pushed: Vec<u32> = timeline.session.tokens().skip(at).collect();
    engine.set_offline(true);
    cut.push(&pushed).expect("it fits");
    cut.advance().await.expect("a pass");
    settle(&engine, &mut cut).await;
    assert_eq!(cut.divergence(), None);
}
