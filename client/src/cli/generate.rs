//! Generating until there is enough, there is no room, or the user has had enough.

use std::fmt;
use std::pin::pin;

use anyhow::Result;
use outrigger::{Engine, Session, Token};

use super::view::Totals;

/// What came of generating.
pub(crate) struct Said {
    pub(crate) totals: Totals,
    /// What ended it before the model did, or the number of tokens that were wanted.
    pub(crate) cut: Option<Cut>,
}

/// What cuts a text short.
#[derive(PartialEq)]
pub(crate) enum Cut {
    /// So many tokens are all that a session holds.
    Context(usize),
    /// Ctrl-C.
    User,
}

impl fmt::Display for Cut {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Cut::Context(len) => write!(f, "the context of {len} tokens is full"),
            Cut::User => f.write_str("interrupted"),
        }
    }
}

/// Generates `wanted` tokens, or as many as there is room for; `show` sees each at once and says whether to go on.
pub(crate) async fn generate(
    engine: &Engine,
    session: &mut Session,
    wanted: Option<usize>,
    mut show: impl FnMut(&Token) -> std::io::Result<bool>,
) -> Result<Said> {
    let mut interrupted = pin!(tokio::signal::ctrl_c());
    let room = session.room();
    let mut totals = Totals::default();
    for _ in 0..wanted.unwrap_or(room).min(room) {
        let token = tokio::select! {
            biased;
            _ = &mut interrupted => return Ok(Said { totals, cut: Some(Cut::User) }),
            token = session.step() => token?,
        };
        totals.add(&token);
        if !show(&token)? {
            return Ok(Said { totals, cut: None });
        }
    }
    let full = wanted.is_none_or(|wanted| wanted > room);
    Ok(Said { totals, cut: full.then(|| Cut::Context(engine.context())) })
}
