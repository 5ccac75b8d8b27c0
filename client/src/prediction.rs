//! What a model says comes next, and how far that is from what another says. Arithmetic in f64.

/// A distribution over the vocabulary: the softmax of some logits.
#[derive(Clone, Copy, Debug)]
pub struct Prediction<'a> {
    /// `[vocab]`.
    logits: &'a [f32],
    /// log sum exp(logits).
    log_sum: f64,
}

/// How far a device's prediction q is from the full model's p.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Distance {
    /// KL(p || q), nats.
    pub kl: f64,
    /// Whether both find the same token likeliest.
    pub top1: bool,
    /// Sum of min(p, q): how often speculative decoding (Leviathan et al. 2023) would keep a token that the device drew.
    pub acceptance: f64,
}

impl<'a> Prediction<'a> {
    /// The softmax of `logits`, `[vocab]`.
    pub fn new(logits: &'a [f32]) -> Prediction<'a> {
        let max = f64::from(logits.iter().copied().fold(f32::NEG_INFINITY, f32::max));
        let sum: f64 = logits.iter().map(|&logit| (f64::from(logit) - max).exp()).sum();
        Prediction { logits, log_sum: max + sum.ln() }
    }

    /// -log probability of `token`, nats.
    ///
    /// # Panics
    /// If the vocabulary has no such token.
    pub fn surprise(&self, token: u32) -> f64 {
        self.log_sum - f64::from(self.logits[token as usize])
    }

    /// How far this prediction is from the `full` model's.
    pub fn distance(&self, full: &Prediction<'_>) -> Distance {
        let (mut kl, mut apart) = (0.0, 0.0);
        for (&ours, &theirs) in self.logits.iter().zip(full.logits) {
            let log_q = f64::from(ours) - self.log_sum;
            let log_p = f64::from(theirs) - full.log_sum;
            let (q, p) = (log_q.exp(), log_p.exp());
            kl += p * (log_p - log_q);
            apart += (p - q).abs();
        }
        // min(p, q) = (p + q - |p - q|) / 2, and both add up to 1: exactly 1 where they are the same.
        let acceptance = 1.0 - apart / 2.0;
        Distance { kl, top1: self.likeliest() == full.likeliest(), acceptance }
    }

    /// The first of the likeliest tokens.
    fn likeliest(&self) -> usize {
        let larger = |best: usize, token: usize| {
            if self.logits[token] > self.logits[best] { token } else { best }
        };
        (0..self.logits.len()).fold(0, larger)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Logits of probabilities, shifted: a softmax does not mind.
    fn logits(probabilities: [f64; 3]) -> [f32; 3] {
        probabilities.map(|p| p.ln() as f32 + 3.0)
    }

    #[test]
    fn as_the_formulas_say() {
        let (p, q) = ([0.5, 0.25, 0.25], [0.25, 0.25, 0.5]);
        let (full, ours) = (logits(p), logits(q));
        let (full, ours) = (Prediction::new(&full), Prediction::new(&ours));
        let distance = ours.distance(&full);
        let kl: f64 = p.iter().zip(q).map(|(p, q)| p * (p / q).ln()).sum();
        assert!((distance.kl - kl).abs() < 1e-6, "{distance:?}");
        assert!((distance.acceptance - 0.75).abs() < 1e-6, "{distance:?}");
        assert!(!distance.top1);
        assert!((ours.surprise(2) - 2f64.ln()).abs() < 1e-6);
        let same = Distance { kl: 0.0, top1: true, acceptance: 1.0 };
        assert_eq!(full.distance(&full), same);
    }
}
