//! The commands, one a file.

mod args;
mod bench;
mod chat;
mod demo;
mod embedded;
mod eval;
mod generate;
mod inspect;
mod pack;
mod packing;
mod proxy;
mod replay;
mod run;
mod serve;
mod simulate;
mod synth;
mod view;

use std::ffi::OsStr;

use anyhow::{Result, bail};
use clap::{CommandFactory, FromArgMatches, Parser, Subcommand};
use tracing_subscriber::EnvFilter;

pub(crate) use view::note;

/// Run a mixture-of-experts model that is too big for the device, on the device.
#[derive(Debug, Parser)]
#[command(name = "outrigger", version, propagate_version = true)]
pub(crate) struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// See it work: generate with an expert server, cut the link, restore it
    Demo(demo::Demo),
    /// Generate text
    Run(run::Run),
    /// Talk to the model
    Chat(chat::Chat),
    /// Serve chats and completions over HTTP, as OpenAI's clients expect them
    Serve(serve::Serve),
    /// Show what a model file holds and what fits in which budget
    Inspect(inspect::Inspect),
    /// Measure perplexity and coverage on texts, and the distance to the full model
    Eval(eval::Eval),
    /// Make what a device installs: the trunk, and every expert as well as a budget allows
    Pack(pack::Pack),
    /// Measure the speed of prefill and decode
    Bench(bench::Bench),
    /// Replay routing traces against cache sizes and policies
    Replay(replay::Replay),
    /// Write a random-weight model at real dimensions
    Synth(synth::Synth),
    /// Simulate a device on a bad network, in virtual time
    Simulate(simulate::Simulate),
    /// Put a slow, narrow or dead link between a device and a server
    Proxy(proxy::Proxy),
    /// Print a shell's completion script
    Completions {
        /// The shell
        shell: clap_complete::Shell,
    },
}

impl Cli {
    /// What the command line and the environment say; a variable that is empty says nothing.
    pub(crate) fn from_user() -> Cli {
        let empty = |name: &OsStr| std::env::var_os(name).is_some_and(|value| value.is_empty());
        let command = Cli::command().mut_subcommands(|command| {
            command.mut_args(|arg| match arg.get_env().is_some_and(empty) {
                true => arg.env(None::<&'static str>),
                false => arg,
            })
        });
        let mut matches = command.get_matches();
        let parsed = Cli::from_arg_matches_mut(&mut matches);
        parsed.unwrap_or_else(|error| error.format(&mut Cli::command()).exit())
    }

    pub(crate) async fn run(self) -> Result<()> {
        match self.command {
            Command::Demo(demo) => demo.run().await,
            Command::Run(run) => run.run().await,
            Command::Chat(chat) => chat.run().await,
            Command::Serve(serve) => serve.run().await,
            Command::Inspect(inspect) => inspect.run(),
            Command::Eval(eval) => eval.run().await,
            Command::Pack(pack) => pack.run().await,
            Command::Bench(bench) => bench.run().await,
            Command::Replay(replay) => replay.run(),
            Command::Synth(synth) => synth.run(),
            Command::Simulate(simulate) => simulate.run(),
            Command::Proxy(proxy) => proxy.run().await,
            Command::Completions { shell } => {
                let command = &mut Cli::command();
                let mut script = Vec::new();
                clap_complete::generate(shell, command, "outrigger", &mut script);
                Ok(view::put(&String::from_utf8_lossy(&script))?)
            }
        }
    }
}

/// Logs go to standard error, warnings only unless `RUST_LOG` says otherwise.
///
/// # Errors
/// `RUST_LOG` says nothing that can be understood.
pub(crate) fn start_log() -> Result<()> {
    let wanted = args::from_env("RUST_LOG");
    let wanted = wanted.as_deref().unwrap_or("warn");
    let Ok(filter) = EnvFilter::try_new(wanted) else {
        bail!("RUST_LOG: found `{wanted}`, expected a level or filters such as outrigger=debug");
    };
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        // It would be told to standard error too.
        .log_internal_errors(false)
        .init();
    Ok(())
}
