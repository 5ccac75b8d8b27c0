//! `outrigger-server`: serves a model's experts to devices.

mod cli;

use std::process::ExitCode;
use std::thread::available_parallelism;

use anyhow::Context as _;

fn main() -> ExitCode {
    let command = cli::parse();
    // The threads that compute are the server's own; these only do IO. A second one on two cores would only make each
    // wake the other.
    let io_threads = available_parallelism().map_or(1, |n| (n.get() / 2).clamp(1, 4));
    let ran = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(io_threads)
        .enable_all()
        .build()
        .context("cannot start the IO threads")
        .and_then(|runtime| {
            let ran = runtime.block_on(command.run());
            // Nobody waits for a file whose reading does not end.
            runtime.shutdown_background();
            ran
        });
    match ran {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("outrigger-server: {error:#}");
            ExitCode::FAILURE
        }
    }
}
