//! The commands, one a file.

mod load;
mod serve;

use std::ffi::{OsStr, OsString};
use std::fs;
use std::path::Path;

use anyhow::{Context as _, anyhow};
use clap::{CommandFactory as _, FromArgMatches as _, Parser, Subcommand, ValueEnum};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::filter::LevelFilter;

/// Runs experts of a model for devices that hold only some of them.
#[derive(Debug, Parser)]
#[command(version, arg_required_else_help = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    Serve(Box<serve::Serve>),
    Load(load::Load),
}

impl Command {
    /// How its log looks.
    pub(crate) fn log(&self) -> LogForm {
        match self {
            Command::Serve(serve) => serve.log,
            Command::Load(_) => LogForm::Text,
        }
    }

    pub(crate) async fn run(self) -> anyhow::Result<()> {
        match self {
            Command::Serve(serve) => serve.run().await,
            Command::Load(load) => load.run().await,
        }
    }
}

/// What the command line and the environment say; a variable that is empty says nothing. A line that begins with a flag
/// of `serve` means `serve`.
pub(crate) fn parse() -> Command {
    let mut args: Vec<OsString> = std::env::args_os().collect();
    let first = args.get(1).and_then(|arg| arg.to_str()).unwrap_or_default();
    if first.starts_with('-') && !["-h", "--help", "-V", "--version"].contains(&first) {
        args.insert(1, "serve".into());
    }
    let empty = |name: &OsStr| std::env::var_os(name).is_some_and(|value| value.is_empty());
    let cli = Cli::command().mut_subcommands(|command| {
        command.mut_args(|arg| match arg.get_env().is_some_and(empty) {
            true => arg.env(None::<&'static str>),
            false => arg,
        })
    });
    let parsed = Cli::from_arg_matches_mut(&mut cli.get_matches_from(args));
    parsed.unwrap_or_else(|error| error.format(&mut Cli::command()).exit()).command
}

/// How a line of the log looks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum LogForm {
    Text,
    Json,
}

/// Logs go to standard error, from `info` on unless `RUST_LOG` says otherwise.
pub(crate) fn start_logs(form: LogForm) -> anyhow::Result<()> {
    let filter = EnvFilter::builder().with_default_directive(LevelFilter::INFO.into()).from_env();
    // Its error says the same thing several times.
    let filter = filter.map_err(|_| {
        let found = std::env::var_os("RUST_LOG").unwrap_or_default();
        anyhow!(
            "RUST_LOG: found {found:?}, expected LEVEL or TARGET=LEVEL, with commas between them"
        )
    })?;
    let logs = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    match form {
        LogForm::Json => logs.json().init(),
        LogForm::Text => logs.with_target(false).init(),
    }
    Ok(())
}

fn read(path: &Path) -> anyhow::Result<Vec<u8>> {
    fs::read(path).with_context(|| format!("cannot read {}", path.display()))
}
