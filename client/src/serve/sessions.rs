//! So many sessions at a time, each kept for whoever goes on with its text, and a queue of bounded length before them.

use std::ops::{Deref, DerefMut};
use std::sync::{Arc, Mutex, MutexGuard};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::error::ApiError;
use crate::engine::Engine;
use crate::error::Result;
use crate::sample::SamplerConfig;
use crate::session::Session;

/// All sessions.
pub(super) struct Sessions {
    pub(super) engine: Arc<Engine>,
    /// One for each session.
    places: Arc<Semaphore>,
    queue: Semaphore,
    kept: Mutex<Kept>,
    most: usize,
}

/// Sessions that nobody uses, the one that was used last at the end; and how many there are in all.
#[derive(Default)]
struct Kept {
    idle: Vec<Session>,
    all: usize,
}

/// A place in which one request is computed.
pub(super) struct Place {
    _permit: OwnedSemaphorePermit,
}

impl Sessions {
    pub(super) fn new(engine: Arc<Engine>, most: usize, queue: usize) -> Arc<Sessions> {
        Arc::new(Sessions {
            engine,
            places: Arc::new(Semaphore::new(most)),
            queue: Semaphore::new(queue),
            kept: Mutex::default(),
            most,
        })
    }

    /// Waits for a place.
    ///
    /// # Errors
    /// As many wait already as may.
    pub(super) async fn place(&self) -> Result<Place, ApiError> {
        if let Ok(permit) = self.places.clone().try_acquire_owned() {
            return Ok(Place { _permit: permit });
        }
        let full = |_| ApiError::overloaded("too many requests are waiting");
        let _waits = self.queue.try_acquire().map_err(full)?;
        let permit = self.places.clone().acquire_owned().await.expect("it is never closed");
        Ok(Place { _permit: permit })
    }

    /// The session whose text has the longest beginning in common with `prompt`, or a new one where that is less than
    /// half of it and there may be one more.
    pub(super) fn lease(self: &Arc<Self>, place: Place, prompt: &[u32]) -> Result<Lease> {
        let mut kept = self.kept();
        let common = |session: &Session| session.common(prompt);
        // Of equals the one that was not used for longest.
        let best = kept.idle.iter().map(common).enumerate().rev().max_by_key(|(_, common)| *common);
        let session = match best {
            Some((i, common)) if 2 * common >= prompt.len() || kept.all == self.most => {
                kept.idle.remove(i)
            }
            _ => {
                let session = self.engine.session(SamplerConfig::default())?;
                kept.all += 1;
                session
            }
        };
        Ok(Lease { session: Some(session), sessions: self.clone(), _place: place })
    }

    fn kept(&self) -> MutexGuard<'_, Kept> {
        self.kept.lock().expect("nothing panics under this lock")
    }
}

/// A session, until this is dropped.
pub(super) struct Lease {
    session: Option<Session>,
    sessions: Arc<Sessions>,
    _place: Place,
}

impl Deref for Lease {
    type Target = Session;

    fn deref(&self) -> &Session {
        self.session.as_ref().expect("it is taken in `drop` only")
    }
}

impl DerefMut for Lease {
    fn deref_mut(&mut self) -> &mut Session {
        self.session.as_mut().expect("it is taken in `drop` only")
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        let mut kept = self.sessions.kept();
        // After a panic nobody knows what it holds.
        match self.session.take().filter(|_| !std::thread::panicking()) {
            Some(session) => kept.idle.push(session),
            None => kept.all -= 1,
        }
    }
}
