//! The server as a process of its own, to be killed and frozen.

use std::io::{BufRead, BufReader};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::LazyLock;

/// A running `outrigger-server`; dropping it is `kill -9`.
pub struct ServerProcess {
    child: Child,
    /// Where it listens.
    pub address: SocketAddr,
}

impl ServerProcess {
    /// Starts the real binary and waits until it says where it listens; port 0 is any.
    pub fn start(model: &Path, port: u16) -> ServerProcess {
        ServerProcess::start_at(model, SocketAddr::from(([127, 0, 0, 1], port)))
    }

    /// The same, with any address of this machine.
    pub fn start_at(model: &Path, listen: SocketAddr) -> ServerProcess {
        let mut child = Command::new(&*BINARY)
            .arg("-m")
            .arg(model)
            .args(["--listen", &listen.to_string(), "-t", "1"])
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .expect("the server starts");
        let out = BufReader::new(child.stdout.take().expect("it is piped"));
        let listening = out.lines().map_while(Result::ok).find_map(|line| {
            line.strip_prefix("listening on ")?.split_whitespace().next()?.parse().ok()
        });
        ServerProcess { child, address: listening.expect("it says where it listens") }
    }

    /// Stops the process where it stands, or lets it go on: its connections stay open and say nothing.
    pub fn freeze(&self, frozen: bool) {
        let signal = if frozen { "-STOP" } else { "-CONT" };
        let sent = Command::new("kill").args([signal, &self.child.id().to_string()]).status();
        assert!(sent.is_ok_and(|status| status.success()), "it runs");
    }
}

impl Drop for ServerProcess {
    fn drop(&mut self) {
        self.child.kill().expect("it runs");
        self.child.wait().expect("it died");
    }
}

/// The server's binary beside this test's own, built if it is not there yet or not this source's.
static BINARY: LazyLock<PathBuf> = LazyLock::new(|| {
    let test = std::env::current_exe().expect("this test has a path");
    let profile = test.parent().and_then(|deps| deps.parent()).expect("target/<profile>/deps");
    let release = profile.ends_with("release").then_some("--release");
    let build = ["build", "--quiet", "-p", "outrigger-server"].into_iter().chain(release);
    let built = Command::new(env!("CARGO")).args(build).status();
    assert!(built.is_ok_and(|status| status.success()), "the server builds");
    profile.join("outrigger-server")
});
