//! A few shapes on a white ground, as SVG and as PNG.

use std::fmt::Write as _;

use tiny_skia::{
    Color, FillRule, LineCap, LineJoin, Paint, Path, PathBuilder, Pixmap, Rect, Stroke, StrokeDash,
    Transform,
};

use super::{Colour, Error, font};

/// Pixels of the PNG for a unit of the SVG.
const PIXELS: f32 = 2.0;

pub(super) struct Scene {
    pub(super) width: f32,
    pub(super) height: f32,
    pub(super) shapes: Vec<Shape>,
}

/// What is drawn, later ones above earlier ones. Units are CSS pixels, y downwards.
pub(super) enum Shape {
    Rect { x: f32, y: f32, width: f32, height: f32, fill: Colour },
    Area { points: Vec<(f32, f32)>, fill: Colour },
    Line { points: Vec<(f32, f32)>, width: f32, colour: Colour, dashed: bool },
    Dots { points: Vec<(f32, f32)>, radius: f32, fill: Colour },
    Text { x: f32, y: f32, size: f32, anchor: Anchor, colour: Colour, text: String },
}

#[derive(Clone, Copy)]
pub(super) enum Anchor {
    Start,
    Middle,
    End,
}

/// Lengths of a dash and of the gap behind it.
const DASH: [f32; 2] = [4.0, 3.0];

impl Scene {
    pub(super) fn svg(&self) -> String {
        let Scene { width, height, shapes } = self;
        let mut out = format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width} {height}\" \
             font-family=\"DejaVu Sans, Verdana, sans-serif\">\n\
             <rect width=\"{width}\" height=\"{height}\" fill=\"#ffffff\"/>\n"
        );
        for shape in shapes {
            shape.svg(&mut out);
            out += "\n";
        }
        out + "</svg>\n"
    }

    /// # Errors
    /// Larger than memory allows.
    pub(super) fn png(&self) -> Result<Vec<u8>, Error> {
        let (width, height) = ((self.width * PIXELS) as u32, (self.height * PIXELS) as u32);
        let mut pixels = Pixmap::new(width, height).ok_or(Error::Size { width, height })?;
        pixels.fill(Color::WHITE);
        for shape in &self.shapes {
            shape.paint(&mut pixels);
        }
        pixels.encode_png().map_err(|error| Error::Png(error.to_string()))
    }
}

impl Shape {
    /// Writing to a string cannot fail.
    fn svg(&self, out: &mut String) {
        let _ = match self {
            Shape::Rect { x, y, width, height, fill } => write!(
                out,
                "<rect x=\"{x:.1}\" y=\"{y:.1}\" width=\"{width:.1}\" height=\"{height:.1}\" {}/>",
                fill.svg("fill")
            ),
            Shape::Area { points, fill } => {
                write!(out, "<polygon points=\"{}\" {}/>", list(points), fill.svg("fill"))
            }
            Shape::Line { points, width, colour, dashed } => write!(
                out,
                "<polyline points=\"{}\" fill=\"none\" stroke-width=\"{width}\" \
                 stroke-linejoin=\"round\" {}{}/>",
                list(points),
                colour.svg("stroke"),
                if *dashed { " stroke-dasharray=\"4 3\"" } else { "" }
            ),
            Shape::Dots { points, radius, fill } => {
                let _ = write!(out, "<g {}>", fill.svg("fill"));
                for (x, y) in points {
                    let _ = write!(out, "<circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"{radius}\"/>");
                }
                write!(out, "</g>")
            }
            Shape::Text { x, y, size, anchor, colour, text } => write!(
                out,
                "<text x=\"{x:.1}\" y=\"{y:.1}\" font-size=\"{size}\" text-anchor=\"{}\" {}>{}</text>",
                anchor.svg(),
                colour.svg("fill"),
                escape(text)
            ),
        };
    }

    /// Shapes without extent have no path, and are not painted.
    fn paint(&self, pixels: &mut Pixmap) {
        match self {
            Shape::Rect { x, y, width, height, fill } => {
                let rect = Rect::from_xywh(*x, *y, *width, *height);
                paint_area(pixels, rect.map(PathBuilder::from_rect), *fill);
            }
            Shape::Area { points, fill } => paint_area(pixels, polygon(points), *fill),
            Shape::Line { points, width, colour, dashed } => {
                let Some(path) = polyline(points).finish() else { return };
                let dash = dashed.then(|| StrokeDash::new(DASH.to_vec(), 0.0)).flatten();
                let (line_cap, line_join) = (LineCap::Butt, LineJoin::Round);
                let stroke =
                    Stroke { width: *width, line_cap, line_join, dash, ..Stroke::default() };
                pixels.stroke_path(&path, &colour.paint(), &stroke, scaled(), None);
            }
            Shape::Dots { points, radius, fill } => {
                let mut path = PathBuilder::new();
                points.iter().for_each(|(x, y)| path.push_circle(*x, *y, *radius));
                paint_area(pixels, path.finish(), *fill);
            }
            Shape::Text { x, y, size, anchor, colour, text } => {
                let x = x - anchor.share() * font::width(text, *size);
                paint_area(pixels, font::outline(text, *size, x, *y).finish(), *colour);
            }
        }
    }
}

impl Anchor {
    fn svg(self) -> &'static str {
        match self {
            Anchor::Start => "start",
            Anchor::Middle => "middle",
            Anchor::End => "end",
        }
    }

    fn share(self) -> f32 {
        match self {
            Anchor::Start => 0.0,
            Anchor::Middle => 0.5,
            Anchor::End => 1.0,
        }
    }
}

impl Colour {
    fn svg(self, attribute: &str) -> String {
        let Colour { red, green, blue, opacity } = self;
        let colour = format!("{attribute}=\"#{red:02x}{green:02x}{blue:02x}\"");
        if opacity == 255 {
            return colour;
        }
        format!("{colour} {attribute}-opacity=\"{:.2}\"", f32::from(opacity) / 255.0)
    }

    fn paint(self) -> Paint<'static> {
        let mut paint = Paint::default();
        paint.set_color_rgba8(self.red, self.green, self.blue, self.opacity);
        paint
    }
}

fn scaled() -> Transform {
    Transform::from_scale(PIXELS, PIXELS)
}

fn paint_area(pixels: &mut Pixmap, path: Option<Path>, fill: Colour) {
    if let Some(path) = path {
        pixels.fill_path(&path, &fill.paint(), FillRule::Winding, scaled(), None);
    }
}

fn polyline(points: &[(f32, f32)]) -> PathBuilder {
    let mut path = PathBuilder::new();
    for (index, &(x, y)) in points.iter().enumerate() {
        if index == 0 { path.move_to(x, y) } else { path.line_to(x, y) }
    }
    path
}

fn polygon(points: &[(f32, f32)]) -> Option<Path> {
    let mut path = polyline(points);
    path.close();
    path.finish()
}

fn list(points: &[(f32, f32)]) -> String {
    let place = |(x, y): &(f32, f32)| format!("{x:.1},{y:.1}");
    points.iter().map(place).collect::<Vec<_>>().join(" ")
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}
