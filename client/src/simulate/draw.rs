//! The pictures of a run and of a sweep.

use super::plot::{
    Axis, BLUE, Band, Colour, Figure, GREEN, Mark, ORANGE, PURPLE, Panel, SKY, Series, VERMILION,
};
use super::report::{Row, Run};
use super::scenario::CUT;
use super::sweep::Point;
use crate::config::Policy;

/// Shades of the links, in the order in which the timeline names them.
const SHADES: [Colour; 10] = [
    Colour::new(0xffffff),
    Colour::new(0xeaf1f6),
    Colour::new(0xf3efe2),
    Colour::new(0xe9f3ec),
    Colour::new(0xf3eaf2),
    Colour::new(0xfbe0d6),
    Colour::new(0xc9def0),
    Colour::new(0xeadfae),
    Colour::new(0xc6e6d2),
    Colour::new(0xe6cbe4),
];
const CUT_SHADE: Colour = Colour::new(0xd9d9d9);
/// Tokens over which the running means go.
const WINDOW: usize = 16;

/// What happened, over time.
pub(super) fn timeline(run: &Run) -> Figure {
    let summary = run.summary();
    let quality = match summary.ppl.zip(summary.ppl_full) {
        Some((ppl, full)) => format!("perplexity {ppl:.1} against the full model's {full:.1}"),
        None => format!("expected acceptance by the full model {:.2}", summary.acceptance),
    };
    let subtitle = format!(
        "{} tokens in {:.1} s, {} of them provisional when said, {} at the end; {quality}",
        summary.tokens, summary.seconds, summary.provisional, summary.unsettled
    );
    let end = summary.seconds.max(f64::MIN_POSITIVE);
    Figure {
        title: run.scenario.title.clone(),
        subtitle,
        x: Axis::new("time, s").from(0.0).to(end),
        bands: bands(run, end),
        marks: marks(run, end),
        panels: vec![
            tokens(&run.rows),
            waits(run),
            coverage(&run.rows),
            loss(run),
            bytes(&run.rows),
            calls(&run.rows),
        ],
    }
}

/// What each share of residents costs, for each policy.
pub(super) fn sweep(title: &str, points: &[Point]) -> Figure {
    let colours = [ORANGE, GREEN, BLUE, PURPLE];
    let mut policies: Vec<Policy> = Vec::new();
    for point in points {
        if !policies.contains(&point.policy) {
            policies.push(point.policy);
        }
    }
    let panel = |title: &str, y: Axis, figure: &dyn Fn(&Point) -> f64| {
        let of = |(policy, colour): (&Policy, Colour)| {
            let own = points.iter().filter(|point| point.policy == *policy);
            let line: Vec<_> = own.map(|point| (100.0 * point.cache, figure(point))).collect();
            [
                Series::dots("", colour, line.clone()),
                Series::line(&policy.to_string(), colour, line),
            ]
        };
        let series = policies.iter().zip(colours).flat_map(of).collect();
        Panel { title: title.to_owned(), y, series }
    };
    Figure {
        title: format!("{title}: offline, by what is resident"),
        subtitle: "The second half of what was read, without a server; the first half was connected and warmed the cache".to_owned(),
        x: Axis::new("experts on the device, % of their bytes").from(0.0).to(100.0),
        panels: vec![
            panel("Perplexity, times the full model's", Axis::new("").log(), &|p| p.ppl_ratio),
            panel("Expected acceptance", Axis::new("").from(0.0).to(1.0), &|p| p.acceptance),
            panel("Coverage", Axis::new("").from(0.0).to(1.0), &|p| p.coverage),
        ],
        ..Figure::default()
    }
}

fn bands(run: &Run, end: f64) -> Vec<Band> {
    let mut names: Vec<&str> = Vec::new();
    let events = run.scenario.timeline.iter();
    let changes: Vec<(f64, &str)> =
        events.filter_map(|e| Some((e.at.0.as_secs_f64(), e.link.as_deref()?))).collect();
    let mut bands = Vec::new();
    for (index, &(from, name)) in changes.iter().enumerate() {
        let to = changes.get(index + 1).map_or(end, |next| next.0).min(end);
        if name != CUT && !names.contains(&name) {
            names.push(name);
        }
        let shade = match names.iter().position(|known| *known == name) {
            Some(place) => SHADES[place % SHADES.len()],
            None => CUT_SHADE,
        };
        if from < to {
            bands.push(Band { from, to, label: name.to_owned(), shade });
        }
    }
    bands
}

fn marks(run: &Run, end: f64) -> Vec<Mark> {
    let events = run.scenario.timeline.iter();
    let changes = events.filter_map(|event| Some((event.at.0.as_secs_f64(), event.server?)));
    changes
        .filter(|(at, _)| *at <= end)
        .map(|(at, change)| Mark { at, label: change.words().to_owned() })
        .collect()
}

/// A value for as long as its token took.
fn steps(rows: &[Row], figure: impl Fn(&Row) -> f64) -> Vec<(f64, f64)> {
    let step = |row: &Row| spans(row).map(|time| (time, figure(row)));
    rows.iter().flat_map(step).collect()
}

/// From when a token was asked for to when it was there.
fn spans(row: &Row) -> [f64; 2] {
    [row.asked, row.ready].map(|time| time.as_secs_f64())
}

fn over_time(rows: &[Row], figure: impl Fn(&Row) -> f64) -> Vec<(f64, f64)> {
    rows.iter().map(|row| (row.ready.as_secs_f64(), figure(row))).collect()
}

/// Means over the last tokens.
fn running(rows: &[Row], figure: impl Fn(&Row) -> f64) -> Vec<(f64, f64)> {
    let values: Vec<f64> = rows.iter().map(figure).collect();
    let mean = |place: usize| {
        let last = &values[(place + 1).saturating_sub(WINDOW)..=place];
        last.iter().sum::<f64>() / last.len() as f64
    };
    rows.iter().enumerate().map(|(i, row)| (row.ready.as_secs_f64(), mean(i))).collect()
}

fn tokens(rows: &[Row]) -> Panel {
    let area = |low: fn(&Row) -> usize, high: fn(&Row) -> usize| -> Vec<(f64, f64, f64)> {
        let place = |row: &Row| (row.ready.as_secs_f64(), low(row) as f64, high(row) as f64);
        rows.iter().map(place).collect()
    };
    Panel {
        title: "Tokens".to_owned(),
        y: Axis::new("").from(0.0),
        series: vec![
            Series::between("settled", SKY, area(|_| 0, |row| row.settled)),
            Series::between("provisional", ORANGE, area(|row| row.settled, |row| row.computed)),
        ],
    }
}

fn waits(run: &Run) -> Panel {
    let deadline = run.scenario.device.deadline.0.as_secs_f64() * 1e3;
    let (first, last) = (0.0, run.rows.last().map_or(0.0, |row| row.ready.as_secs_f64()));
    Panel {
        title: "Wait for the server, ms a token".to_owned(),
        y: Axis::new("").from(0.0),
        series: vec![
            Series::dashed("deadline", VERMILION, vec![(first, deadline), (last, deadline)]),
            Series::dots("wait", BLUE, over_time(&run.rows, |r| r.waited.as_secs_f64() * 1e3)),
        ],
    }
}

fn coverage(rows: &[Row]) -> Panel {
    let (arrived, with) =
        (|row: &Row| f64::from(row.coverage), |row: &Row| f64::from(row.coverage + row.standin));
    let mut series = Vec::new();
    if rows.iter().any(|row| row.standin > 0.0) {
        series.push(Series::line("and stand-ins", GREEN, steps(rows, with)));
    }
    series.push(Series::line("coverage", BLUE, steps(rows, arrived)));
    let title = "Coverage, share of the routed weight".to_owned();
    Panel { title, y: Axis::new("").from(0.0).to(1.0), series }
}

fn loss(run: &Run) -> Panel {
    let rows = &run.rows;
    let kl = Series::line("KL divergence", VERMILION, running(rows, |row| row.distance.kl));
    let excess = Series::line("excess loss", BLUE, running(rows, |row| row.nll - row.nll_full));
    Panel {
        title: format!("Loss against the full model, nats a token, mean of the last {WINDOW}"),
        y: Axis::new(""),
        // What the model itself wrote is what it finds likely.
        series: if run.is_own_text() { vec![kl] } else { vec![kl, excess] },
    }
}

fn bytes(rows: &[Row]) -> Panel {
    let sum = |bytes: fn(&Row) -> u64| {
        let mut sum = 0;
        let add = |row: &Row| {
            sum += bytes(row);
            (row.ready.as_secs_f64(), sum as f64 / f64::from(1 << 20))
        };
        rows.iter().map(add).collect()
    };
    Panel {
        title: "Bytes so far, MiB".to_owned(),
        y: Axis::new("").from(0.0),
        series: vec![
            Series::line("up", ORANGE, sum(|row| row.tally.bytes_up)),
            Series::line("down", BLUE, sum(|row| row.tally.bytes_down)),
        ],
    }
}

/// A place where routed calls run.
struct Place {
    name: &'static str,
    colour: Colour,
    calls: fn(&Row) -> u64,
}

const PLACES: [Place; 5] = [
    Place { name: "here", colour: BLUE, calls: |row| row.tally.local },
    Place { name: "on the server", colour: SKY, calls: |row| row.tally.remote },
    Place { name: "a stand-in here", colour: GREEN, calls: |row| row.tally.standin },
    Place { name: "another expert here", colour: ORANGE, calls: replaced },
    Place {
        name: "nowhere",
        colour: VERMILION,
        calls: |row| row.tally.missing - row.tally.standin - replaced(row),
    },
];

/// Where the routed calls ran, stacked, as shares of all.
fn calls(rows: &[Row]) -> Panel {
    let share = |row: &Row, places: &[Place]| {
        let all = row.tally.local + row.tally.remote + row.tally.missing;
        let some: u64 = places.iter().map(|place| (place.calls)(row)).sum();
        some as f64 / all.max(1) as f64
    };
    let area = |index: usize| {
        let edges = |row: &Row| {
            let (low, high) = (share(row, &PLACES[..index]), share(row, &PLACES[..=index]));
            spans(row).map(|time| (time, low, high))
        };
        let Place { name, colour, .. } = PLACES[index];
        Series::between(name, colour, rows.iter().flat_map(edges).collect())
    };
    let any = |index: &usize| rows.iter().any(|row| (PLACES[*index].calls)(row) > 0);
    Panel {
        title: "Where the routed experts ran, share of calls".to_owned(),
        y: Axis::new("").from(0.0).to(1.0),
        series: (0..PLACES.len()).filter(any).map(area).collect(),
    }
}

/// Missing calls in whose place another expert ran.
fn replaced(row: &Row) -> u64 {
    row.tally.substituted.min(row.tally.missing - row.tally.standin)
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use crate::simulate::Scenario;

    use super::*;

    #[test]
    fn ten_links_have_ten_shades() {
        let mut text = "title = ''\nmodel = ''\nlength = '10s'\ninput.prompt = 'a'\n\
                        device = { expert_cache = '40%', deadline = '1s' }\n"
            .to_owned();
        for n in 0..10 {
            text += &format!("[links.l{n}]\nround_trip = '1ms'\n");
            text += &format!("[[timeline]]\nat = '{n}s'\nlink = 'l{n}'\n");
        }
        text += "[[timeline]]\nat = '10s'\nlink = 'cut'\n";
        let scenario = Scenario::parse(&text, Path::new("ten.toml")).expect("it is well formed");
        let run = Run { scenario, rows: Vec::new(), text: String::new(), divergence: None };
        let shades: Vec<_> = bands(&run, 11.0).into_iter().map(|band| band.shade).collect();
        assert_eq!(shades.len(), 11);
        for (n, shade) in shades.iter().enumerate() {
            assert!(!shades[..n].contains(shade), "{n}: {shade:?}");
        }
    }

    #[test]
    fn a_sweep_of_one_size_has_the_axis_of_all() {
        let (policy, cache) = (Policy::Reroute, 0.5);
        let point = Point {
            policy,
            cache,
            tokens: 1,
            ppl_ratio: 1.1,
            kl: 0.1,
            acceptance: 0.9,
            coverage: 0.9,
        };
        let x = sweep("A tunnel", &[point]).x;
        assert_eq!((x.low, x.high), (Some(0.0), Some(100.0)));
    }
}
