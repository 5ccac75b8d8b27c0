//! The Latin part of DejaVu Sans: what a text's width is, and its outlines.

use std::sync::LazyLock;

use tiny_skia::PathBuilder;
use ttf_parser::{Face, GlyphId, OutlineBuilder};

static FACE: LazyLock<Face<'static>> = LazyLock::new(|| {
    Face::parse(include_bytes!("font/DejaVuSans-Latin.ttf"), 0).expect("the font is part of this")
});

fn glyph(letter: char) -> GlyphId {
    FACE.glyph_index(letter).unwrap_or_default()
}

fn advance(glyph: GlyphId, size: f32) -> f32 {
    f32::from(FACE.glyph_hor_advance(glyph).unwrap_or(0)) * size / f32::from(FACE.units_per_em())
}

/// The width of a text at a size, in the size's unit.
pub(super) fn width(text: &str, size: f32) -> f32 {
    text.chars().map(|letter| advance(glyph(letter), size)).sum()
}

/// As much of a text as a width has room for; where that is not all, an ellipsis says so.
pub(super) fn fit(text: &str, size: f32, room: f32) -> String {
    if width(text, size) <= room {
        return text.to_owned();
    }
    let mut room = room - width("…", size);
    let fits = |letter: &char| {
        room -= advance(glyph(*letter), size);
        room >= 0.0
    };
    text.chars().take_while(fits).chain(['…']).collect()
}

/// A text's outlines, its baseline beginning at (`x`, `y`), y downwards.
pub(super) fn outline(text: &str, size: f32, mut x: f32, y: f32) -> PathBuilder {
    let mut path = PathBuilder::new();
    for letter in text.chars() {
        let glyph = glyph(letter);
        let scale = size / f32::from(FACE.units_per_em());
        FACE.outline_glyph(glyph, &mut Pen { path: &mut path, scale, x, y });
        x += advance(glyph, size);
    }
    path
}

struct Pen<'a> {
    path: &'a mut PathBuilder,
    scale: f32,
    x: f32,
    y: f32,
}

impl Pen<'_> {
    fn at(&self, x: f32, y: f32) -> (f32, f32) {
        (self.x + x * self.scale, self.y - y * self.scale)
    }
}

impl OutlineBuilder for Pen<'_> {
    fn move_to(&mut self, x: f32, y: f32) {
        let (x, y) = self.at(x, y);
        self.path.move_to(x, y);
    }

    fn line_to(&mut self, x: f32, y: f32) {
        let (x, y) = self.at(x, y);
        self.path.line_to(x, y);
    }

    fn quad_to(&mut self, x1: f32, y1: f32, x: f32, y: f32) {
        let ((x1, y1), (x, y)) = (self.at(x1, y1), self.at(x, y));
        self.path.quad_to(x1, y1, x, y);
    }

    fn curve_to(&mut self, x1: f32, y1: f32, x2: f32, y2: f32, x: f32, y: f32) {
        let ((x1, y1), (x2, y2), (x, y)) = (self.at(x1, y1), self.at(x2, y2), self.at(x, y));
        self.path.cubic_to(x1, y1, x2, y2, x, y);
    }

    fn close(&mut self) {
        self.path.close();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_text_is_cut_to_its_room() {
        assert_eq!(fit("a train", 10.0, width("a train", 10.0)), "a train");
        let cut = fit("a train", 10.0, width("a train", 10.0) - 0.1);
        assert!(cut.starts_with("a tr") && cut.ends_with('…'), "{cut}");
        assert!(width(&cut, 10.0) < width("a train", 10.0));
        assert_ne!(glyph('…'), GlyphId(0), "the font has an ellipsis");
    }
}
