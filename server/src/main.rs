//! `outrigger-server`: serves a model's experts to devices.

mod cli;

use std::process::ExitCode;
use std::thread::available_parallelism;

use anyhow::Context as _;
use cli::{LogForm, start_logs};
use tokio::runtime::Builder;
use tracing::{Level, enabled};

fn main() -> ExitCode {
    let command = cli::parse();
    let form = command.log();
    // The threads that compute are the server's own; these only do IO. A second one on two cores would only make each
    // wake the other.
    let io_threads = available_parallelism().map_or(1, |n| (n.get() / 2).clamp(1, 4));
    let ran = start_logs(form)
        .and_then(|()| {
            let runtime =
                Builder::new_multi_thread().worker_threads(io_threads).enable_all().build();
            runtime.context("cannot start the IO threads")
        })
        .and_then(|runtime| {
            let ran = runtime.block_on(command.run());
            // Nobody waits for a file whose reading does not end.
            runtime.shutdown_background();
            ran
        });
    match ran {
        Ok(()) => ExitCode::SUCCESS,
        // Whoever reads a log that is JSON reads nothing else. There is none yet where it cannot be started.
        Err(error) if form == LogForm::Json && enabled!(Level::ERROR) => {
            tracing::error!("{error:#}");
            ExitCode::FAILURE
        }
        Err(error) => {
            eprintln!("outrigger-server: {error:#}");
            ExitCode::FAILURE
        }
    }
}
