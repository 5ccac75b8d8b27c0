//! A device that writes while a script of faults happens, on the simulated network.

use std::path::PathBuf;
use std::time::Duration;

use outrigger::simulate::{Conditions, Network, ServerEvent, Timeline};
use outrigger::{Budget, Dial, Elsewhere, Engine, EngineConfig, Token};
use tokio::time::Instant;

use crate::{fixtures, greedy};

/// What a token may wait for the server, in simulated time.
pub const DEADLINE: Duration = Duration::from_millis(300);
/// Simulated time between two tokens: computing costs none.
pub const PACE: Duration = Duration::from_millis(50);
/// A good link.
pub const GOOD: Conditions = Conditions {
    round_trip: Duration::from_millis(4),
    jitter: Duration::from_millis(1),
    up: None,
    down: None,
    loss: 0.0,
    only: None,
};

/// Something that happens to the network or to the server.
#[derive(Clone, Debug)]
pub enum Event {
    /// No message passes between the two.
    Partition,
    /// Messages pass again, as at the start.
    Repair,
    /// Every message takes this long.
    Latency(Duration),
    /// So many bits pass a second, each way.
    Bandwidth(f64),
    /// The device sleeps for so long, its radio off.
    Sleep(Duration),
    /// The server dies.
    Crash,
    /// A server starts where the last one died, with this model.
    Restart(PathBuf),
}

/// One token as the device saw it.
#[derive(Clone, Debug)]
pub struct Observed {
    /// Simulated time at which it was asked for.
    pub asked: Duration,
    /// The token.
    pub token: Token,
}

/// What a run left.
pub struct Outcome {
    /// Every token, in order.
    pub tokens: Vec<Observed>,
    /// Logits after the last token, once everything was settled; empty if it could not be.
    pub settled_logits: Vec<f32>,
    /// All token ids, the prompt included.
    pub ids: Vec<u32>,
}

/// Generates for `length` of simulated time with the demo model, a cache of a quarter and the other experts on the
/// server, while `script` happens.
pub fn run(seed: u64, length: Duration, script: &[(Duration, Event)]) -> Outcome {
    println!("seed {seed}");
    let link = |(at, event): &(Duration, Event)| match event {
        Event::Partition => vec![(*at, None)],
        Event::Repair => vec![(*at, Some(GOOD))],
        Event::Latency(latency) => {
            vec![(*at, Some(Conditions { round_trip: 2 * *latency, ..GOOD }))]
        }
        Event::Bandwidth(rate) => {
            vec![(*at, Some(Conditions { up: Some(*rate), down: Some(*rate), ..GOOD }))]
        }
        Event::Sleep(length) => vec![(*at, None), (*at + *length, Some(GOOD))],
        Event::Crash | Event::Restart(_) => Vec::new(),
    };
    let server = |event: &Event| match event {
        Event::Crash => Some(ServerEvent::Kill),
        Event::Restart(model) => Some(ServerEvent::Start(model.clone())),
        _ => None,
    };
    let links = script.iter().flat_map(link);
    let sleep = script.iter().find_map(|(at, event)| match event {
        Event::Sleep(length) => Some((*at, *length)),
        _ => None,
    });
    let servers = script.iter().filter_map(|(at, event)| Some((*at, server(event)?)));
    let network = Network {
        seed,
        link: Timeline::from_iter([(Duration::ZERO, Some(GOOD))].into_iter().chain(links)),
        server: [(Duration::ZERO, ServerEvent::Start(fixtures::demo_model()))]
            .into_iter()
            .chain(servers)
            .collect(),
        threads: 1,
    };
    network.run(|dial| generate(dial, length, sleep)).expect("the server runs")
}

/// `sleep`: when the device falls asleep, and for how long.
async fn generate(
    dial: Dial,
    length: Duration,
    mut sleep: Option<(Duration, Duration)>,
) -> Outcome {
    let epoch = Instant::now();
    let mut config = EngineConfig::new(fixtures::demo_model());
    config.servers = vec![Network::SERVER.to_owned()];
    config.expert_cache = Budget::Fraction(0.25);
    config.elsewhere = Elsewhere::Absent;
    config.deadline = DEADLINE;
    config.threads = 1;
    config.dial = dial;
    let engine = Engine::open(config).await.expect("the model opens");
    let mut session = greedy(&engine);
    session.push_text("It was a dark and stormy night").expect("it fits");
    let mut tokens = Vec::new();
    while epoch.elapsed() < length {
        let asked = epoch.elapsed();
        tokens.push(Observed { asked, token: session.step().await.expect("it goes on") });
        tokio::time::sleep(PACE).await;
        if let Some((_, length)) = sleep.take_if(|(at, _)| epoch.elapsed() >= *at) {
            tokio::time::sleep(length).await;
        }
    }
    let mut settled_logits = Vec::new();
    if engine.wait_connected(Duration::from_secs(5)).await {
        session.settle().await.expect("it settles");
        // The last token is pending: nothing was computed for it yet.
        if session.settled() + 1 == session.len() {
            settled_logits = session.logits().to_vec();
        }
    }
    let ids = session.tokens().collect();
    Outcome { tokens, settled_logits, ids }
}
