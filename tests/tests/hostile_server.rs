//! A server that answers wrongly is never believed: degraded output and a reason, whatever it says.

use std::time::Duration;

use outrigger::{Engine, EngineConfig, LinkState};
use outrigger_proto::encoding::{encode_f32, encode_f48};
use outrigger_proto::v1::{Encoding, ForwardRequest, ForwardResponse};
use outrigger_tests::double::pretend;
use outrigger_tests::{greedy, quarter};

/// How it lies.
#[derive(Clone, Copy, Debug)]
enum Lie {
    NotANumber,
    Infinity,
    TooFewRows,
    TooFewBytes,
    AnotherRequest,
    AnotherLayer,
    ExpertsNobodyAskedFor,
    NoSuchEncoding,
}

const LIES: [Lie; 8] = [
    Lie::NotANumber,
    Lie::Infinity,
    Lie::TooFewRows,
    Lie::TooFewBytes,
    Lie::AnotherRequest,
    Lie::AnotherLayer,
    Lie::ExpertsNobodyAskedFor,
    Lie::NoSuchEncoding,
];

/// Half of everything, but for the lie.
fn answer(lie: Lie, request: &ForwardRequest, width: usize) -> ForwardResponse {
    let values = request.rows as usize * width;
    let mut answer = ForwardResponse {
        request_id: request.request_id,
        layer: request.layer,
        rows: request.rows,
        encoding: Encoding::F48.into(),
        sums: encode_f48(&vec![0.5; values]),
        not_run: Vec::new(),
        compute_us: 1,
    };
    match lie {
        Lie::NotANumber => answer.sums = encode_f48(&vec![f64::NAN; values]),
        Lie::Infinity => {
            answer.encoding = Encoding::F32.into();
            answer.sums = encode_f32(&vec![f32::INFINITY; values]);
        }
        Lie::TooFewRows => answer.rows = 0,
        Lie::TooFewBytes => answer.sums = encode_f48(&vec![0.5; values - 1]),
        Lie::AnotherRequest => answer.request_id += 1,
        Lie::AnotherLayer => answer.layer += 1,
        Lie::ExpertsNobodyAskedFor => answer.not_run = vec![70_000],
        Lie::NoSuchEncoding => answer.encoding = 99,
    }
    answer
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_lie_is_merged() {
    // What the device says with nobody to ask.
    let config = |servers| EngineConfig { deadline: Duration::from_secs(20), ..quarter(servers) };
    let alone = Engine::open(config(Vec::new())).await.expect("it opens");
    let mut expected = greedy(&alone);
    expected.push_text("Once upon a time").expect("it fits");
    expected.step().await.expect("a token");

    let width = alone.spec().n_embd;
    for lie in LIES {
        let address = pretend(move |request| Ok(answer(lie, request.get_ref(), width))).await;
        let engine = Engine::open(config(vec![address.to_string()])).await.expect("it opens");
        assert!(engine.wait_connected(Duration::from_secs(5)).await, "{lie:?}: it looks well");
        let mut session = greedy(&engine);
        session.push_text("Once upon a time").expect("it fits");
        let token = session.step().await.expect("a token");
        assert!(token.coverage < 1.0 && token.provisional, "{lie:?}: {token:?}");
        assert_eq!(token.tally.remote, 0, "{lie:?}: {token:?}");
        let fault = token.fault.expect("a reason");
        assert!(fault.contains("bad answer"), "{lie:?}: {fault}");
        assert_eq!(session.logits(), expected.logits(), "{lie:?}: nothing of it was merged");
        assert_ne!(engine.servers()[0].state, LinkState::Up, "{lie:?}: it is left alone");
    }
}
