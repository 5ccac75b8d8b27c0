//! Figures: panels above one another that share their x axis, as SVG and as PNG.

mod draw;
mod font;
mod scale;
mod scene;

use scale::Scale;

/// Why a figure is none.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum Error {
    /// There is no memory for so many pixels.
    #[error("a picture of {width} x {height} pixels")]
    Size {
        /// Pixels across.
        width: u32,
        /// Pixels down.
        height: u32,
    },
    /// The pixels cannot be written as PNG.
    #[error("PNG: {0}")]
    Png(String),
}

/// A colour, each part from 0 to 255.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Colour {
    red: u8,
    green: u8,
    blue: u8,
    opacity: u8,
}

impl Colour {
    /// An opaque colour, `0xrrggbb`.
    pub(super) const fn new(rgb: u32) -> Colour {
        Colour { red: (rgb >> 16) as u8, green: (rgb >> 8) as u8, blue: rgb as u8, opacity: 255 }
    }

    /// The colour, see-through: 0 is invisible, 255 opaque.
    pub(super) const fn opacity(self, opacity: u8) -> Colour {
        Colour { opacity, ..self }
    }
}

// Okabe and Ito's colours (2008), which people with any colour vision tell apart.
/// For what is right, and for the first of several.
pub(super) const BLUE: Colour = Colour::new(0x0072b2);
/// For what is doubtful, and for the second.
pub(super) const ORANGE: Colour = Colour::new(0xe69f00);
/// For the third.
pub(super) const GREEN: Colour = Colour::new(0x009e73);
/// For what is wrong or missing, and for the fourth.
pub(super) const VERMILION: Colour = Colour::new(0xd55e00);
/// For what goes with blue.
pub(super) const SKY: Colour = Colour::new(0x56b4e9);
/// For the fifth.
pub(super) const PURPLE: Colour = Colour::new(0xcc79a7);

/// Panels above one another.
#[derive(Clone, Debug, Default)]
pub(super) struct Figure {
    /// In one line.
    pub(super) title: String,
    /// Below the title; none if empty.
    pub(super) subtitle: String,
    /// All panels' x axis.
    pub(super) x: Axis,
    /// Shaded stretches of the x axis.
    pub(super) bands: Vec<Band>,
    /// Moments on the x axis.
    pub(super) marks: Vec<Mark>,
    /// From top to bottom.
    pub(super) panels: Vec<Panel>,
}

/// An axis.
#[derive(Clone, Debug, Default)]
pub(super) struct Axis {
    /// What it shows, with its unit.
    pub(super) label: String,
    /// How values are spread.
    scale: Scale,
    /// The lower end; a round value below all data if `None`.
    pub(super) low: Option<f64>,
    /// The upper end.
    pub(super) high: Option<f64>,
}

/// A shaded stretch of the x axis.
#[derive(Clone, Debug)]
pub(super) struct Band {
    /// Where it begins.
    pub(super) from: f64,
    /// Where it ends.
    pub(super) to: f64,
    /// What holds there; bands of one name are explained once.
    pub(super) label: String,
    /// Its shade.
    pub(super) shade: Colour,
}

/// A moment on the x axis.
#[derive(Clone, Debug)]
pub(super) struct Mark {
    /// Where.
    pub(super) at: f64,
    /// What happened.
    pub(super) label: String,
}

/// One plot of a figure.
#[derive(Clone, Debug, Default)]
pub(super) struct Panel {
    /// What it shows, with its unit.
    pub(super) title: String,
    /// Its y axis, whose label is the title.
    pub(super) y: Axis,
    /// What is drawn, later above earlier.
    pub(super) series: Vec<Series>,
}

/// Values of one kind.
#[derive(Clone, Debug)]
pub(super) struct Series {
    /// What they are; not explained if empty.
    pub(super) label: String,
    /// Their colour.
    pub(super) colour: Colour,
    /// How they are drawn.
    pub(super) form: Form,
}

/// How values are drawn.
#[derive(Clone, Debug)]
pub(super) enum Form {
    /// A line through (x, y).
    Line(Vec<(f64, f64)>),
    /// A dashed line through (x, y).
    Dashed(Vec<(f64, f64)>),
    /// A dot at each (x, y).
    Dots(Vec<(f64, f64)>),
    /// The area between the second and the third of each (x, low, high).
    Between(Vec<(f64, f64, f64)>),
}

impl Axis {
    /// A linear axis around its values.
    pub(super) fn new(label: &str) -> Axis {
        Axis { label: label.to_owned(), ..Axis::default() }
    }

    /// The axis, from `low` on.
    pub(super) fn from(self, low: f64) -> Axis {
        Axis { low: Some(low), ..self }
    }

    /// The axis, up to `high`.
    pub(super) fn to(self, high: f64) -> Axis {
        Axis { high: Some(high), ..self }
    }

    /// The axis, logarithmic.
    pub(super) fn log(self) -> Axis {
        Axis { scale: Scale::Log, ..self }
    }
}

impl Series {
    /// A line.
    pub(super) fn line(label: &str, colour: Colour, points: Vec<(f64, f64)>) -> Series {
        Series { label: label.to_owned(), colour, form: Form::Line(points) }
    }

    /// A dashed line.
    pub(super) fn dashed(label: &str, colour: Colour, points: Vec<(f64, f64)>) -> Series {
        Series { label: label.to_owned(), colour, form: Form::Dashed(points) }
    }

    /// Dots.
    pub(super) fn dots(label: &str, colour: Colour, points: Vec<(f64, f64)>) -> Series {
        Series { label: label.to_owned(), colour, form: Form::Dots(points) }
    }

    /// An area.
    pub(super) fn between(label: &str, colour: Colour, points: Vec<(f64, f64, f64)>) -> Series {
        Series { label: label.to_owned(), colour, form: Form::Between(points) }
    }
}

impl Figure {
    /// The figure as an SVG file.
    pub(super) fn svg(&self) -> String {
        draw::scene(self).svg()
    }

    /// The figure as a PNG file, twice as many pixels as the SVG has units.
    ///
    /// # Errors
    /// More pixels than memory.
    pub(super) fn png(&self) -> Result<Vec<u8>, Error> {
        draw::scene(self).png()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_files_show_the_same_figure() {
        let series = vec![Series::between("a < b", BLUE, vec![(0.0, 0.0, 1.0), (1.0, 0.5, 1.0)])];
        let bands = vec![Band { from: 0.0, to: 1.0, label: "cut".to_owned(), shade: SKY }];
        let marks = vec![Mark { at: 0.5, label: "now".to_owned() }];
        let panels = vec![Panel { title: "y".to_owned(), series, ..Panel::default() }];
        let figure = Figure { title: "t".to_owned(), bands, marks, panels, ..Figure::default() };
        let svg = figure.svg();
        for part in ["a &lt; b", ">cut</text>", ">now</text>", "#0072b2", "viewBox=\"0 0 1080 "] {
            assert!(svg.contains(part), "{part}: {svg}");
        }
        let png = tiny_skia::Pixmap::decode_png(&figure.png().expect("it is small"));
        let png = png.expect("it is a PNG");
        assert_eq!(png.width(), 2160);
        // In the middle of the area, well below its upper edge.
        let pixel = png.pixel(1000, png.height() / 2).expect("it is within");
        assert_eq!((pixel.red(), pixel.green(), pixel.blue()), (0x00, 0x72, 0xb2));
    }

    #[test]
    fn text_that_xml_does_not_allow_is_left_out() {
        let title = "a\u{7}b\u{1b}[2J\u{ffff}c\nd".to_owned();
        let figure = Figure { title, panels: vec![Panel::default()], ..Figure::default() };
        assert!(figure.svg().contains(">ab[2Jcd</text>"), "{}", figure.svg());
    }

    #[test]
    fn a_title_without_room_ends_in_an_ellipsis() {
        let long = Figure { title: "long ".repeat(60) + "end", ..Figure::default() };
        assert!(long.svg().contains("…</text>") && !long.svg().contains("end</text>"));
        let short = Figure { title: "long ".repeat(6) + "end", ..Figure::default() };
        assert!(short.svg().contains("long end</text>"));
    }

    #[test]
    fn the_names_of_many_bands_share_the_line() {
        let label = |n: u32| format!("a name that is quite long, {n}");
        let band =
            |n: u32| Band { from: n.into(), to: (n + 1).into(), label: label(n), shade: SKY };
        let figure = Figure { bands: (0..12).map(band).collect(), ..Figure::default() };
        let svg = figure.svg();
        let places = svg.split(" x=\"").skip(1).filter_map(|rest| rest.split_once('"'));
        let places: Vec<f32> = places.map(|(x, _)| x.parse().expect("a number")).collect();
        assert!(places.len() == 24 && places.iter().all(|x| *x < 1080.0), "{places:?}");
    }

    #[test]
    fn marks_without_room_for_two_names_share_one() {
        let mark = |at, label: &str| Mark { at, label: label.to_owned() };
        let marks = vec![mark(0.5, "dies"), mark(0.51, "starts"), mark(0.9, "stops")];
        let figure = Figure { marks, panels: vec![Panel::default()], ..Figure::default() };
        for name in [">dies, starts</text>", ">stops</text>"] {
            assert!(figure.svg().contains(name), "{name}: {}", figure.svg());
        }
    }

    #[test]
    fn a_figure_of_nothing_is_drawn() {
        let figure = Figure { panels: vec![Panel::default()], ..Figure::default() };
        assert!(figure.svg().ends_with("</svg>\n"));
        assert!(figure.png().is_ok());
    }
}
