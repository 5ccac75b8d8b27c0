//! Lines of the log that strangers can cause as often as they like.

use std::sync::Mutex;
use std::time::Duration;

use tokio::time::Instant;

/// From one such line to the next.
const INTERVAL: Duration = Duration::from_secs(1);

/// Lets one of them through in a while, and counts the others.
#[derive(Debug, Default)]
pub(crate) struct Seldom(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    last: Option<Instant>,
    left_out: u64,
}

impl Seldom {
    /// How many were left out before this one; `None` where it is left out too.
    pub(crate) fn turn(&self) -> Option<u64> {
        let mut state = self.0.lock().expect("nothing panics under this lock");
        if state.last.is_some_and(|last| last.elapsed() < INTERVAL) {
            state.left_out += 1;
            return None;
        }
        state.last = Some(Instant::now());
        Some(std::mem::take(&mut state.left_out))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn one_a_second_says_how_many_there_were_besides() {
        let seldom = Seldom::default();
        assert_eq!([(); 4].map(|()| seldom.turn()), [Some(0), None, None, None]);
        tokio::time::advance(INTERVAL).await;
        assert_eq!([(); 2].map(|()| seldom.turn()), [Some(3), None]);
        tokio::time::advance(INTERVAL).await;
        assert_eq!(seldom.turn(), Some(1));
    }
}
