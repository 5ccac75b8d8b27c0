//! Where everything of a figure goes.

use super::scale::label;
use super::scene::{Anchor, Scene, Shape};
use super::{Axis, Band, Colour, Figure, Form, Panel, Series, font};

const WIDTH: f32 = 1080.0;
const LEFT: f32 = 70.0;
/// The legends' column.
const RIGHT: f32 = 190.0;
/// What stays free of text on the right.
const EDGE: f32 = 8.0;
const TOP: f32 = 52.0;
const SUBTITLE: f32 = 20.0;
const BANDS: f32 = 30.0;
/// One panel's plot, and what is above it: its title and a gap.
const PANEL: f32 = 118.0;
const LONE_PANEL: f32 = 360.0;
const HEAD: f32 = 34.0;
/// The x axis' values and label.
const FOOT: f32 = 58.0;

const SMALL: f32 = 12.0;
const NORMAL: f32 = 13.5;
const LARGE: f32 = 20.0;

const INK: Colour = Colour::new(0x222222);
const FAINT: Colour = Colour::new(0x666666);
const GRID: Colour = Colour::new(0x000000).opacity(26);
const FRAME: Colour = Colour::new(0x999999);

pub(super) fn scene(figure: &Figure) -> Scene {
    let subtitle = if figure.subtitle.is_empty() { 0.0 } else { SUBTITLE };
    let bands = if figure.bands.is_empty() { 0.0 } else { BANDS };
    let marks = if figure.marks.is_empty() { 0.0 } else { SUBTITLE };
    let top = TOP + subtitle + bands + marks;
    let plot = if figure.panels.len() == 1 { LONE_PANEL } else { PANEL };
    let height = top + figure.panels.len() as f32 * (HEAD + plot) + FOOT;
    let mut scene = Scene { width: WIDTH, height, shapes: Vec::new() };
    scene.text(LEFT, 36.0, LARGE, Anchor::Start, INK, &figure.title);
    scene.text(LEFT, 36.0 + SUBTITLE, NORMAL, Anchor::Start, FAINT, &figure.subtitle);
    scene.band_legend(&figure.bands, 36.0 + subtitle + BANDS);

    let xs = figure.panels.iter().flat_map(|panel| &panel.series).flat_map(Series::xs);
    let x_range = figure.x.scale.range(xs, figure.x.low, figure.x.high);
    for (index, panel) in figure.panels.iter().enumerate() {
        let y = top + HEAD + index as f32 * (HEAD + plot);
        let values = panel.series.iter().flat_map(Series::ys);
        let y_range = panel.y.scale.range(values, panel.y.low, panel.y.high);
        let frame = Frame { figure, panel, x_range, y_range, y, height: plot };
        frame.draw(&mut scene);
        if index + 1 == figure.panels.len() {
            frame.draw_x_axis(&mut scene);
        }
    }
    draw_marks(figure, x_range, top, plot, &mut scene);
    scene
}

/// Dashed lines through all panels, named above the first.
fn draw_marks(figure: &Figure, x_range: (f64, f64), top: f32, plot: f32, scene: &mut Scene) {
    let mut names: Vec<(f32, String)> = Vec::new();
    for mark in &figure.marks {
        let x = place_x(&figure.x, x_range, mark.at);
        let free = names.last().map_or(LEFT, |(at, name)| at + font::width(name, SMALL) + 6.0);
        // A name without room around its line begins at it; without any room it joins the one before.
        let centred = x - font::width(&mark.label, SMALL) / 2.0;
        let start = if centred >= free { centred } else { x };
        match names.last_mut() {
            Some((_, name)) if start < free => *name += &format!(", {}", mark.label),
            _ => names.push((start, mark.label.clone())),
        }
        for index in 0..figure.panels.len() {
            let y = top + HEAD + index as f32 * (HEAD + plot);
            scene.line(vec![(x, y), (x, y + plot)], 1.2, INK, true);
        }
    }
    for (at, name) in names {
        scene.text(at, top + 4.0, SMALL, Anchor::Start, INK, &name);
    }
}

fn place_x(axis: &Axis, range: (f64, f64), value: f64) -> f32 {
    LEFT + axis.scale.place(value, range).clamp(0.0, 1.0) as f32 * (WIDTH - LEFT - RIGHT)
}

/// One panel's plot.
struct Frame<'a> {
    figure: &'a Figure,
    panel: &'a Panel,
    x_range: (f64, f64),
    y_range: (f64, f64),
    y: f32,
    height: f32,
}

impl Frame<'_> {
    fn at(&self, x: f64, y: f64) -> (f32, f32) {
        let up = self.panel.y.scale.place(y, self.y_range).clamp(0.0, 1.0) as f32;
        (place_x(&self.figure.x, self.x_range, x), self.y + (1.0 - up) * self.height)
    }

    fn draw(&self, scene: &mut Scene) {
        let bottom = self.y + self.height;
        for band in &self.figure.bands {
            let [from, to] = [band.from, band.to].map(|x| self.at(x, 0.0).0);
            let (width, height) = (to - from, self.height);
            scene.shapes.push(Shape::Rect { x: from, y: self.y, width, height, fill: band.shade });
        }
        let wanted = if self.height > 2.0 * PANEL { 8 } else { 4 };
        for tick in self.panel.y.scale.ticks(self.y_range, wanted) {
            let (_, y) = self.at(self.x_range.0, tick);
            scene.line(vec![(LEFT, y), (WIDTH - RIGHT, y)], 1.0, GRID, false);
            scene.text(LEFT - 8.0, y + 4.0, SMALL, Anchor::End, FAINT, &label(tick));
        }
        for series in &self.panel.series {
            self.draw_series(series, scene);
        }
        scene.line(vec![(LEFT, bottom), (WIDTH - RIGHT, bottom)], 1.0, FRAME, false);
        scene.line(vec![(LEFT, self.y), (LEFT, bottom)], 1.0, FRAME, false);
        scene.text(LEFT, self.y - 9.0, NORMAL, Anchor::Start, INK, &self.panel.title);
        self.draw_legend(scene);
    }

    fn draw_series(&self, series: &Series, scene: &mut Scene) {
        let colour = series.colour;
        let places = |points: &[(f64, f64)]| -> Vec<(f32, f32)> {
            points.iter().map(|&(x, y)| self.at(x, y)).collect()
        };
        scene.shapes.push(match &series.form {
            Form::Line(points) => {
                Shape::Line { points: places(points), width: 1.8, colour, dashed: false }
            }
            Form::Dashed(points) => {
                Shape::Line { points: places(points), width: 1.4, colour, dashed: true }
            }
            Form::Dots(points) => {
                let radius = if points.len() > 60 { 1.6 } else { 3.5 };
                Shape::Dots { points: places(points), radius, fill: colour }
            }
            Form::Between(points) => {
                let upper = points.iter().map(|&(x, _, high)| self.at(x, high));
                let lower = points.iter().rev().map(|&(x, low, _)| self.at(x, low));
                Shape::Area { points: upper.chain(lower).collect(), fill: colour }
            }
        });
    }

    /// To the right of the plot, areas from top to bottom as they are stacked.
    fn draw_legend(&self, scene: &mut Scene) {
        let (x, mut y) = (WIDTH - RIGHT + 16.0, self.y + 10.0);
        for series in self.panel.series.iter().rev().filter(|series| !series.label.is_empty()) {
            let (colour, middle) = (series.colour, y - 4.0);
            scene.shapes.push(match series.form {
                Form::Between(_) => {
                    Shape::Rect { x, y: y - 9.0, width: 18.0, height: 10.0, fill: colour }
                }
                Form::Dots(_) => {
                    Shape::Dots { points: vec![(x + 9.0, middle)], radius: 3.0, fill: colour }
                }
                Form::Line(_) | Form::Dashed(_) => Shape::Line {
                    points: vec![(x, middle), (x + 18.0, middle)],
                    width: 2.0,
                    colour,
                    dashed: matches!(series.form, Form::Dashed(_)),
                },
            });
            scene.text(x + 26.0, y, SMALL, Anchor::Start, INK, &series.label);
            y += 19.0;
        }
    }

    fn draw_x_axis(&self, scene: &mut Scene) {
        let bottom = self.y + self.height;
        for tick in self.figure.x.scale.ticks(self.x_range, 10) {
            let (x, _) = self.at(tick, self.y_range.0);
            scene.line(vec![(x, bottom), (x, bottom + 5.0)], 1.0, FRAME, false);
            scene.text(x, bottom + 19.0, SMALL, Anchor::Middle, FAINT, &label(tick));
        }
        let middle = (LEFT + WIDTH - RIGHT) / 2.0;
        scene.text(middle, bottom + 42.0, NORMAL, Anchor::Middle, INK, &self.figure.x.label);
    }
}

impl Scene {
    fn text(&mut self, x: f32, y: f32, size: f32, anchor: Anchor, colour: Colour, text: &str) {
        // What no font shows, and XML does not allow.
        let shown = |c: &char| !c.is_control() && !matches!(c, '\u{fffe}' | '\u{ffff}');
        let text: String = text.chars().filter(shown).collect();
        let text = match anchor {
            Anchor::Start => font::fit(&text, size, self.width - EDGE - x),
            Anchor::Middle | Anchor::End => text,
        };
        if !text.is_empty() {
            self.shapes.push(Shape::Text { x, y, size, anchor, colour, text });
        }
    }

    fn line(&mut self, points: Vec<(f32, f32)>, width: f32, colour: Colour, dashed: bool) {
        self.shapes.push(Shape::Line { points, width, colour, dashed });
    }

    /// A swatch and a name for each kind of band, in the order in which they come.
    fn band_legend(&mut self, bands: &[Band], y: f32) {
        let mut kinds: Vec<&Band> = Vec::new();
        for band in bands {
            if !kinds.iter().any(|kind| kind.label == band.label) {
                kinds.push(band);
            }
        }
        let share = (self.width - LEFT) / kinds.len() as f32;
        let mut x = LEFT;
        for band in kinds {
            let (top, width, height) = (y - 12.0, 22.0, 14.0);
            self.shapes.push(Shape::Rect { x, y: top, width, height, fill: band.shade });
            let corners = [(0.0, 0.0), (width, 0.0), (width, height), (0.0, height), (0.0, 0.0)];
            let outline = corners.map(|(dx, dy)| (x + dx, top + dy)).to_vec();
            self.line(outline, 0.8, FRAME, false);
            let name = font::fit(&band.label, SMALL, share - 54.0);
            self.text(x + 30.0, y, SMALL, Anchor::Start, INK, &name);
            x += 54.0 + font::width(&name, SMALL);
        }
    }
}

impl Series {
    fn xs(&self) -> Box<dyn Iterator<Item = f64> + '_> {
        match &self.form {
            Form::Line(points) | Form::Dashed(points) | Form::Dots(points) => {
                Box::new(points.iter().map(|point| point.0))
            }
            Form::Between(points) => Box::new(points.iter().map(|point| point.0)),
        }
    }

    fn ys(&self) -> Box<dyn Iterator<Item = f64> + '_> {
        match &self.form {
            Form::Line(points) | Form::Dashed(points) | Form::Dots(points) => {
                Box::new(points.iter().map(|point| point.1))
            }
            Form::Between(points) => Box::new(points.iter().flat_map(|point| [point.1, point.2])),
        }
    }
}
