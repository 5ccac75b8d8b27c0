//! `outrigger`: the device's command line.
#![forbid(unsafe_code)]

mod cli;

use std::io;
use std::process::ExitCode;

#[tokio::main]
async fn main() -> ExitCode {
    let command = cli::Cli::from_user();
    let ended = match cli::start_log() {
        Ok(()) => command.run().await,
        Err(error) => Err(error),
    };
    match ended {
        Ok(()) => ExitCode::SUCCESS,
        // Whoever read the output has seen enough: `outrigger run … | head`.
        Err(error) if is_broken_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            cli::note(format!("outrigger: {error:#}"));
            ExitCode::FAILURE
        }
    }
}

fn is_broken_pipe(error: &anyhow::Error) -> bool {
    let mut causes = error.chain().filter_map(|cause| cause.downcast_ref::<io::Error>());
    causes.any(|cause| cause.kind() == io::ErrorKind::BrokenPipe)
}
