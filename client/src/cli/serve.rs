//! `outrigger serve`: the model for other programs, over HTTP.

use std::net::SocketAddr;
use std::path::PathBuf;

use anyhow::{Context as _, Result, bail};
use clap::Args;
use outrigger::serve::{ServeConfig, serve};
use outrigger_server::stop_signal;
use tokio::net::TcpListener;

use super::args::{ModelArgs, PlacementArgs, SamplingArgs, open, secret};
use super::view::{line, note};

/// Serve chats and completions over HTTP, as OpenAI's clients expect them.
#[derive(Debug, Args)]
pub(crate) struct Serve {
    #[command(flatten)]
    model: ModelArgs,
    /// Where to listen; port 0 takes any free one
    #[arg(
        long,
        value_name = "ADDR",
        default_value = "127.0.0.1:8080",
        env = "OUTRIGGER_SERVE_LISTEN"
    )]
    listen: SocketAddr,
    /// The model's name for clients [default: that of its file]
    #[arg(short, long, value_name = "NAME")]
    alias: Option<String>,
    /// A name that this server is reached by, besides localhost and addresses. May be given several times
    #[arg(long = "allow-host", value_name = "NAME")]
    allow_hosts: Vec<String>,
    /// File with the key that callers have to show as a bearer token [default: what OUTRIGGER_API_KEY says, if anything]
    #[arg(long, value_name = "FILE")]
    api_key_file: Option<PathBuf>,
    /// Listen beyond this machine without a key: anyone there can use the model
    #[arg(long)]
    insecure: bool,
    /// Requests that are computed at a time, each with a KV cache of its own
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=64))]
    parallel: u16,
    /// Requests that wait for that; those on top are sent away
    #[arg(long, value_name = "N", default_value_t = 16, value_parser = clap::value_parser!(u16).range(0..=1024))]
    queue: u16,
    #[command(flatten)]
    sampling: SamplingArgs,
    #[command(flatten)]
    placement: PlacementArgs,
}

impl Serve {
    pub(crate) async fn run(self) -> Result<()> {
        let serving = self.serving()?;
        // Before the model, so that a signal while it opens is not lost.
        let stop = stop_signal()?;
        let mut config =
            self.placement.config(self.model.model.clone(), &self.model.compute).await?;
        config.sessions = serving.parallel;
        let engine = open(config).await?;
        let listener = TcpListener::bind(self.listen)
            .await
            .with_context(|| format!("cannot listen on {}", self.listen))?;
        let address = listener.local_addr().context("cannot tell the address")?;
        if !address.ip().is_loopback() {
            let who = if serving.api_key.is_some() { "with the key" } else { "without a key" };
            note(format!("warning: {address} is open to other machines, {who} and without TLS"));
        }
        line(format!("listening on http://{address}"))?;
        serve(engine, listener, serving, stop).await;
        Ok(())
    }

    fn serving(&self) -> Result<ServeConfig> {
        let api_key = secret(self.api_key_file.as_deref(), "OUTRIGGER_API_KEY")?;
        if !self.listen.ip().is_loopback() && api_key.is_none() && !self.insecure {
            bail!(
                "{} can be reached from other machines: give --api-key-file, or say --insecure if everyone who can \
                 reach it may use the model",
                self.listen
            );
        }
        let file = self.model.model.file_stem().unwrap_or_default();
        let file = file.to_string_lossy().into_owned();
        Ok(ServeConfig {
            sampler: self.sampling.config()?,
            seed: self.sampling.seed(),
            parallel: self.parallel.into(),
            queue: self.queue.into(),
            allow_hosts: self.allow_hosts.clone(),
            api_key,
            ..ServeConfig::new(self.alias.clone().unwrap_or(file))
        })
    }
}
