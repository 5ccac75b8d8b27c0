//! Strings at which an answer ends.

/// Text that streams towards a reader, up to the first of some strings.
///
/// What could be the beginning of one is held back, together with everything since the last text that went out: so a
/// piece of text is always that of whole tokens, and carries their marks.
#[derive(Debug)]
pub(super) struct Stops<'a> {
    stops: &'a [String],
    held: String,
}

/// What may go out.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Flow {
    /// Nothing yet.
    Held,
    Text(String),
    /// What comes before the stop.
    Stop(String),
}

impl<'a> Stops<'a> {
    /// None of `stops` is empty.
    pub(super) fn new(stops: &'a [String]) -> Stops<'a> {
        Stops { stops, held: String::new() }
    }

    pub(super) fn push(&mut self, text: &str) -> Flow {
        self.held.push_str(text);
        if let Some(at) = self.stops.iter().filter_map(|stop| self.held.find(stop)).min() {
            self.held.truncate(at);
            return Flow::Stop(self.finish());
        }
        if self.held.is_empty() || self.stops.iter().any(|stop| begins(&self.held, stop)) {
            return Flow::Held;
        }
        Flow::Text(self.finish())
    }

    /// What was held back: no more text comes.
    pub(super) fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }
}

/// Whether `text` ends in the beginning of `stop`.
fn begins(text: &str, stop: &str) -> bool {
    stop.char_indices().skip(1).any(|(at, _)| text.ends_with(&stop[..at]))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn what_may_be_a_stop_is_held_until_it_is_none() {
        let stops = ["END".to_owned(), "\n\n".to_owned()];
        let mut flow = Stops::new(&stops);
        assert_eq!(flow.push("a"), Flow::Text("a".to_owned()));
        assert_eq!(flow.push("bE"), Flow::Held);
        assert_eq!(flow.push("N"), Flow::Held);
        assert_eq!(flow.push("ough"), Flow::Text("bENough".to_owned()));
        assert_eq!(flow.push(" EN"), Flow::Held);
        assert_eq!(flow.push("D of it"), Flow::Stop(" ".to_owned()));
        assert_eq!(flow.finish(), "");
    }

    proptest! {
        /// However a text is cut into pieces, all that goes out is what stands before the first stop.
        #[test]
        fn the_text_before_the_first_stop_goes_out(
            text in "[ab\u{e9}]{0,30}",
            stops in prop::collection::vec("[ab\u{e9}]{1,4}", 0..4),
            cuts in prop::collection::vec(1usize..5, 30),
        ) {
            let mut flow = Stops::new(&stops);
            let (mut out, mut stopped) = (String::new(), false);
            let mut chars = text.chars();
            for cut in cuts {
                let piece: String = chars.by_ref().take(cut).collect();
                match flow.push(&piece) {
                    Flow::Held => {}
                    Flow::Text(text) => out.push_str(&text),
                    Flow::Stop(text) => {
                        out.push_str(&text);
                        stopped = true;
                        break;
                    }
                }
            }
            out.push_str(&flow.finish());
            // Pieces are looked at one by one: a stop counts as soon as it is whole.
            let ends = stops.iter().filter_map(|s| text.find(s.as_str()).map(|at| (at + s.len(), at)));
            match ends.min() {
                Some((_, at)) => prop_assert!(stopped && text.starts_with(&out) && out.len() <= at),
                None => prop_assert!(!stopped && out == text),
            }
            prop_assert!(stops.iter().all(|stop| !out.contains(stop.as_str())));
        }
    }
}
