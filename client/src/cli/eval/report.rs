//! The figures of one text, or of all texts together, for machines and for people.

use outrigger::Tally;
use outrigger_experts::LayerStats;
use serde_json::{Value, json};

use super::measure::{Measured, Row, RowAgainstFull};
use super::stats::{Estimate, estimate, mean};
use crate::cli::view::{cache_json, size, table};

/// The figures of some texts, each of which counts the same however long it is.
pub(super) struct Figures {
    tokens: usize,
    nll: f64,
    coverage: f64,
    standin: f64,
    tally: Tally,
    cache: LayerStats,
    seconds: f64,
    against_full: Option<AgainstFull>,
}

struct AgainstFull {
    ppl_ratio: Estimate,
    kl: Estimate,
    top1: Estimate,
    acceptance: Estimate,
    first_divergence: Option<usize>,
    healed_divergence: Option<f64>,
}

impl Figures {
    /// Of texts that have scored rows, all of them.
    pub(super) fn of<'a>(texts: impl IntoIterator<Item = &'a Measured>) -> Figures {
        let texts: Vec<&Measured> = texts.into_iter().collect();
        let means = texts
            .iter()
            .map(|text| mean(text.rows.iter().map(|row| [row.nll, row.coverage, row.standin])));
        let [nll, coverage, standin] = mean(means);
        let mut tally = Tally::default();
        let mut cache = LayerStats::default();
        for text in &texts {
            tally += text.tally;
            cache += text.cache;
        }
        Figures {
            tokens: texts.iter().map(|text| text.rows.len()).sum(),
            nll,
            coverage,
            standin,
            tally,
            cache,
            seconds: texts.iter().map(|text| text.elapsed.as_secs_f64()).sum(),
            against_full: AgainstFull::of(&texts),
        }
    }

    /// One object on one line.
    pub(super) fn json(&self) -> Value {
        let mut figures = json!({
            "tokens": self.tokens,
            "nll": self.nll,
            "ppl": self.nll.exp(),
            "coverage": self.coverage,
            "standin": self.standin,
            "tally": self.tally,
            "cache": cache_json(&self.cache),
            "seconds": self.seconds,
        });
        if let Some(against) = &self.against_full {
            for (name, estimate) in against.estimates() {
                figures[name] = estimate.value.into();
                figures[format!("{name}_low")] = estimate.low.into();
                figures[format!("{name}_high")] = estimate.high.into();
            }
            figures["first_divergence"] = against.first_divergence.into();
            figures["healed_divergence"] = against.healed_divergence.into();
        }
        figures
    }

    fn row(&self, name: &str) -> Vec<String> {
        let mut row = vec![
            name.to_owned(),
            self.tokens.to_string(),
            format!("{:.3}", self.nll.exp()),
            format!("{:.3}", self.coverage),
            format!("{:.3}", self.standin),
        ];
        row.extend(self.estimates(|estimate| estimate.value));
        row
    }

    /// The estimates' values or bounds as cells; none without the full model.
    fn estimates(&self, part: impl Fn(Estimate) -> f64) -> Vec<String> {
        let estimates = self.against_full.iter().flat_map(AgainstFull::estimates);
        estimates.map(|(_, estimate)| format!("{:.4}", part(estimate))).collect()
    }

    fn notes(&self) -> String {
        let Tally { local, remote, missing, standin, substituted, .. } = self.tally;
        let mut notes = format!(
            "expert calls: {local} local, {remote} remote, {standin} approximated, {substituted} replaced, {} missing; \
             {} up, {} down, {} read; {:.1} s\n",
            (missing - standin).saturating_sub(substituted),
            size(self.tally.bytes_up),
            size(self.tally.bytes_down),
            size(self.cache.bytes_read),
            self.seconds,
        );
        if let Some(against) = &self.against_full {
            notes += &against.notes();
        }
        notes
    }
}

impl AgainstFull {
    /// `None` unless every row was compared.
    fn of(texts: &[&Measured]) -> Option<AgainstFull> {
        let columns = |row: &Row| {
            let RowAgainstFull { nll, distance } = row.against_full.as_ref()?;
            let top1 = f64::from(u8::from(distance.top1));
            Some([row.nll - nll, distance.kl, top1, distance.acceptance])
        };
        let rows: Vec<Vec<_>> = texts
            .iter()
            .map(|text| text.rows.iter().map(columns).collect())
            .collect::<Option<_>>()?;
        let [excess, kl, top1, acceptance] = estimate(&rows);
        let differs = |row: &&Row| row.against_full.as_ref().is_some_and(|a| !a.distance.top1);
        let divergences =
            texts.iter().filter_map(|text| Some(text.rows.iter().find(differs)?.position));
        Some(AgainstFull {
            // The geometric mean over texts: the mean of the logarithms.
            ppl_ratio: excess.map(f64::exp),
            kl,
            top1,
            acceptance,
            first_divergence: divergences.min(),
            healed_divergence: texts
                .iter()
                .map(|text| text.healed_divergence)
                .reduce(|a, b| Some(a?.max(b?)))
                .flatten(),
        })
    }

    fn estimates(&self) -> [(&'static str, Estimate); 4] {
        [
            ("ppl_ratio", self.ppl_ratio),
            ("kl", self.kl),
            ("top1", self.top1),
            ("acceptance", self.acceptance),
        ]
    }

    fn notes(&self) -> String {
        let first = match self.first_divergence {
            Some(position) => format!("first says something else at token {position}"),
            None => "nowhere says anything else".to_owned(),
        };
        let healed = match self.healed_divergence {
            Some(difference) => format!("once healed, logits within {difference:.1e}"),
            None => "no server to heal with".to_owned(),
        };
        format!("against the full model: {first}; {healed}\n")
    }
}

/// Columns that every text has.
const PLAIN: [&str; 5] = ["text", "tokens", "perplexity", "coverage", "stand-ins"];
/// Columns of what was compared, in the order of [`AgainstFull::estimates`].
const AGAINST_FULL: [&str; 4] = ["ratio", "KL", "top-1", "acceptance"];

/// What people read: a row a text, then all of them together with their intervals.
pub(super) fn view(texts: &[(&String, Figures)], total: &Figures) -> String {
    let mut header = PLAIN.to_vec();
    if total.against_full.is_some() {
        header.extend(AGAINST_FULL);
    }
    let mut rows = vec![header.into_iter().map(String::from).collect()];
    rows.extend(texts.iter().map(|(name, figures)| figures.row(name)));
    if texts.len() > 1 {
        rows.push(total.row("all"));
    }
    if total.against_full.is_some() {
        let mut bound = |name: &str, part: fn(Estimate) -> f64| {
            let mut row = vec![String::new(); PLAIN.len()];
            row.extend(total.estimates(part));
            row[0] = name.to_owned();
            rows.push(row);
        };
        bound("95 % from", |estimate| estimate.low);
        bound("to", |estimate| estimate.high);
    }
    table(&rows) + &total.notes()
}
