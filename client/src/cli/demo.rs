//! `outrigger demo`: the whole idea in one minute: connected, cut off, healed.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use clap::Args;
use outrigger::proxy::{Conditions, FaultProxy, LinkFault};
use outrigger::{Budget, Elsewhere, Engine, EngineConfig, Session};
use serde_json::json;

use super::args::{ComputeArgs, SamplingArgs, open};
use super::embedded::EmbeddedServer;
use super::generate::{Cut, generate};
use super::run::totals_json;
use super::view::{MarkedText, Totals, line, note, printable, put, size, table};

/// How long the tour waits for the link to come back.
const RECONNECT_PATIENCE: Duration = Duration::from_secs(10);

/// See it work: generate with an expert server, cut the link, restore it.
#[derive(Debug, Args)]
pub(crate) struct Demo {
    /// Model file [default: the repository's models/demo.gguf]
    #[arg(short, long, value_name = "FILE")]
    model: Option<PathBuf>,
    /// The text to continue
    #[arg(
        short,
        long,
        default_value = "Once upon a time there was a king who",
        value_name = "TEXT"
    )]
    prompt: String,
    /// Tokens to generate, a third of them in each phase
    #[arg(short = 'n', long, value_name = "N", default_value_t = 240, value_parser = clap::value_parser!(u32).range(3..))]
    predict: u32,
    /// Memory for experts on the device
    #[arg(long, value_name = "SIZE|PCT", default_value = "40%")]
    expert_cache: Budget,
    #[command(flatten)]
    compute: ComputeArgs,
    #[command(flatten)]
    sampling: SamplingArgs,
    /// Print a JSON object a phase instead of the tour
    #[arg(long)]
    json: bool,
}

/// The three thirds of the tour.
const PHASES: [&str; 3] = ["connected", "cut off", "restored"];

impl Demo {
    pub(crate) async fn run(self) -> Result<()> {
        let sampler = self.sampling.config()?;
        let model = self.model.clone().map_or_else(default_model, Ok)?;
        let server = EmbeddedServer::start(&model).await?;
        let any_port = SocketAddr::from(([127, 0, 0, 1], 0));
        let link = FaultProxy::start(any_port, server.address.to_string())
            .await
            .context("cannot listen on loopback")?;
        let engine = open(self.config(model, link.address())).await?;
        self.introduce(&engine, &server)?;
        let mut session = engine.session(sampler)?;
        session.push_text(&self.prompt)?;
        let phases = self.tour(&engine, &mut session, &link).await?;
        drop((session, engine, link));
        server.stop().await?;
        match self.json {
            true => {
                for (totals, phase) in phases.iter().zip(PHASES) {
                    line(json!({ "phase": phase, "totals": totals_json(totals) }))?;
                }
            }
            false => put(&format!("\n{}", closing_table(&phases)))?,
        }
        Ok(())
    }

    fn config(&self, model: PathBuf, server: SocketAddr) -> EngineConfig {
        let mut config = EngineConfig::new(model);
        config.servers = vec![server.to_string()];
        config.expert_cache = self.expert_cache;
        config.elsewhere = Elsewhere::Absent;
        config.deadline = Duration::from_millis(300);
        self.compute.apply(&mut config);
        config
    }

    /// The three phases; each third's totals.
    async fn tour(
        &self,
        engine: &Engine,
        session: &mut Session,
        link: &FaultProxy,
    ) -> Result<Vec<Totals>> {
        let room = session.room();
        let total = room.min(self.predict as usize);
        if total < self.predict as usize {
            note(format!("the context holds {} tokens: {total} are generated", engine.context()));
        }
        let shares = [total / 3, total * 2 / 3 - total / 3, total - total * 2 / 3];

        self.say("Connected: every expert answers, from the device or from the server.")?;
        let connected = self.generate(engine, session, &self.prompt, shares[0]).await;
        let connected = connected.context("while connected")?;

        link.set(Conditions { state: LinkFault::Silent, ..Conditions::default() });
        self.say(
            "The link is cut. The device goes on with what it has; marked text is provisional.",
        )?;
        let cut_off = self.generate(engine, session, "", shares[1]).await;
        let cut_off = cut_off.context("while cut off")?;

        link.set(Conditions::default());
        self.heal(engine, session).await?;
        let restored = self.generate(engine, session, "", shares[2]).await;
        let restored = restored.context("after the cut")?;
        Ok(vec![connected, cut_off, restored])
    }

    /// Generates `count` tokens, and shows them behind the text `before`.
    async fn generate(
        &self,
        engine: &Engine,
        session: &mut Session,
        before: &str,
        count: usize,
    ) -> Result<Totals> {
        let mut text = MarkedText::new();
        if !self.json {
            text.prompt(before)?;
        }
        let said = generate(engine, session, Some(count), |token| {
            if !self.json {
                text.print(token)?;
            }
            Ok(true)
        });
        let said = said.await?;
        if !self.json {
            text.end()?;
        }
        ensure!(said.cut != Some(Cut::User), "{}", Cut::User);
        Ok(said.totals)
    }

    /// Waits for the server and recomputes what was said without it.
    async fn heal(&self, engine: &Engine, session: &mut Session) -> Result<()> {
        let cut = Instant::now();
        let connected = engine.wait_connected(RECONNECT_PATIENCE).await;
        ensure!(connected, "the server did not come back within {RECONNECT_PATIENCE:?}");
        let reconnected = cut.elapsed();
        let rows = session.len() - session.settled();
        let healing = Instant::now();
        session.settle().await?;
        self.say(&format!(
            "The link is back after {:.0} ms. The device has every expert look at its last {rows} tokens again \
             ({:.0} ms): from here on it says what the full model would.",
            reconnected.as_secs_f64() * 1e3,
            healing.elapsed().as_secs_f64() * 1e3,
        ))?;
        Ok(())
    }

    fn introduce(&self, engine: &Engine, server: &EmbeddedServer) -> std::io::Result<()> {
        let (spec, store) = (engine.spec(), engine.store());
        self.say(&format!(
            "{}: {} layers of {} experts, {} of them used for a token.\n\
             The device holds the trunk and {} of experts ({} of all); the others are absent from it.\n\
             An expert server answers at {}, behind a link that this tour will cut.",
            printable(&spec.name),
            spec.n_layers,
            spec.n_experts,
            spec.n_used,
            size(store.budget_bytes()),
            self.expert_cache,
            server.address,
        ))
    }

    fn say(&self, text: &str) -> std::io::Result<()> {
        if self.json { Ok(()) } else { line(format!("\n{text}\n")) }
    }
}

/// The demo model of the repository: below the working directory, or where this binary was built.
fn default_model() -> Result<PathBuf> {
    let places = [
        PathBuf::from("models/demo.gguf"),
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/demo.gguf"),
    ];
    let found = places.into_iter().find(|path| path.exists());
    found.context(
        "models/demo.gguf is not here; run this in the repository, or give a model with -m",
    )
}

fn closing_table(phases: &[Totals]) -> String {
    let header = [
        "phase", "tokens", "tok/s", "coverage", "local", "remote", "missing", "up", "down",
        "slowest",
    ];
    let mut rows = vec![header.map(String::from).to_vec()];
    for (totals, phase) in phases.iter().zip(PHASES) {
        let [local, remote, _, missing] = totals.shares().map(|share| format!("{share:.1} %"));
        rows.push(vec![
            phase.to_owned(),
            totals.tokens.to_string(),
            format!("{:.1}", totals.tokens_per_second()),
            format!("{:.3}", totals.mean_coverage()),
            local,
            remote,
            missing,
            size(totals.tally.bytes_up),
            size(totals.tally.bytes_down),
            format!("{:.1} ms", totals.slowest.as_secs_f64() * 1e3),
        ]);
    }
    table(&rows)
}
