//! What text was made of: the marks of its tokens, taken together.

use serde_json::{Value, json};

use crate::session::Token;

/// What some tokens were made of.
#[derive(Clone, Debug)]
pub(super) struct Made {
    pub(super) tokens: usize,
    /// Sums over the tokens.
    coverage: f64,
    standin: f64,
    least: f32,
    provisional: bool,
    /// Servers may have rounded their sums.
    rounded: bool,
    /// The last one's that had one.
    fault: Option<String>,
}

impl Made {
    /// Of no token, where servers may round their sums or may not.
    pub(super) fn nothing(rounded: bool) -> Made {
        Made {
            tokens: 0,
            coverage: 0.0,
            standin: 0.0,
            least: 1.0,
            provisional: false,
            rounded,
            fault: None,
        }
    }

    pub(super) fn of(token: &Token) -> Made {
        Made {
            rounded: false,
            tokens: 1,
            coverage: token.coverage.into(),
            standin: token.standin.into(),
            least: token.coverage,
            provisional: token.provisional,
            fault: token.fault.clone(),
        }
    }

    pub(super) fn add(&mut self, other: &Made) {
        self.tokens += other.tokens;
        self.coverage += other.coverage;
        self.standin += other.standin;
        self.least = self.least.min(other.least);
        self.provisional |= other.provisional;
        self.rounded |= other.rounded;
        if other.fault.is_some() {
            self.fault.clone_from(&other.fault);
        }
    }

    /// The `outrigger` object of a part of an answer.
    pub(super) fn part(&self) -> Value {
        let mean = |sum: f64| (sum / self.tokens.max(1) as f64) as f32;
        json!({
            "tokens": self.tokens,
            "coverage": if self.tokens == 0 { 1.0 } else { mean(self.coverage) },
            "least_coverage": self.least,
            "standin": mean(self.standin),
            "provisional": self.provisional,
            "fault": self.fault,
        })
    }

    /// That of a whole one, which also says whether it is what the full model says.
    pub(super) fn whole(&self) -> Value {
        let mut whole = self.part();
        whole["exact"] = self.is_exact().into();
        whole
    }

    pub(super) fn is_exact(&self) -> bool {
        !self.provisional && !self.rounded
    }
}
