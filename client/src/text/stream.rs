//! Whole characters out of single tokens.

use super::Tokenizer;

/// Decodes a token stream: feed it one token after another, and it hands out text as soon as it is
/// complete, since a character may be split over tokens.
///
/// Bytes that cannot become a character are U+FFFD, in the same places as in
/// [`String::from_utf8_lossy`] of the whole.
#[derive(Clone, Debug, Default)]
pub struct StreamDecoder {
    /// The start of a character whose rest has not come yet: at most 3 bytes between calls.
    pending: Vec<u8>,
}

impl StreamDecoder {
    /// A decoder at the start of a text, or where a text goes on.
    pub fn new() -> StreamDecoder {
        StreamDecoder::default()
    }

    /// Takes a token and returns the text that it completes, which may be none.
    pub fn push(&mut self, tokenizer: &Tokenizer, id: u32) -> String {
        self.push_bytes(tokenizer.piece(id))
    }

    /// Takes a token's bytes and returns the text that they complete.
    pub fn push_bytes(&mut self, bytes: &[u8]) -> String {
        self.pending.extend_from_slice(bytes);
        let (mut text, mut kept) = (String::new(), 0);
        let mut chunks = self.pending.utf8_chunks().peekable();
        while let Some(chunk) = chunks.next() {
            text.push_str(chunk.valid());
            if chunks.peek().is_none() && is_incomplete(chunk.invalid()) {
                kept = chunk.invalid().len();
            } else if !chunk.invalid().is_empty() {
                text.push(char::REPLACEMENT_CHARACTER);
            }
        }
        self.pending.drain(..self.pending.len() - kept);
        text
    }

    /// Ends the stream: U+FFFD if a character was left incomplete. The decoder can be used again.
    pub fn finish(&mut self) -> String {
        let incomplete = !self.pending.is_empty();
        self.pending.clear();
        if incomplete { char::REPLACEMENT_CHARACTER.into() } else { String::new() }
    }
}

/// Whether more bytes could still make a character of these.
fn is_incomplete(invalid: &[u8]) -> bool {
    std::str::from_utf8(invalid).is_err_and(|error| error.error_len().is_none())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn decode(pieces: &[&[u8]]) -> Vec<String> {
        let mut decoder = StreamDecoder::new();
        let mut texts: Vec<String> = pieces.iter().map(|p| decoder.push_bytes(p)).collect();
        texts.push(decoder.finish());
        texts
    }

    #[test]
    fn a_character_comes_when_its_last_byte_does() {
        assert_eq!(decode(&[b"a\xF0\x9F", b"\x98", b"\x80b"]), ["a", "", "\u{1F600}b", ""]);
    }

    #[test]
    fn what_cannot_become_a_character_is_replaced() {
        assert_eq!(decode(&[b"\xFFa", b"\xE2\x82", b"b"]), ["\u{FFFD}a", "", "\u{FFFD}b", ""]);
        assert_eq!(decode(&[b"\xE2\x82"]), ["", "\u{FFFD}"]);
    }

    proptest! {
        #[test]
        fn streaming_equals_decoding_the_whole(
            // Lead bytes and continuations far above their share of random bytes.
            bytes in prop::collection::vec(
                prop_oneof![any::<u8>(), 0x80u8..0xC0, Just(0xE2), Just(0xF0), Just(b'a')], 0..40),
            cuts in prop::collection::vec(1usize..5, 40),
        ) {
            let mut decoder = StreamDecoder::new();
            let (mut text, mut rest) = (String::new(), bytes.as_slice());
            for cut in cuts {
                let (piece, after) = rest.split_at(cut.min(rest.len()));
                text.push_str(&decoder.push_bytes(piece));
                rest = after;
            }
            text.push_str(&decoder.finish());
            prop_assert_eq!(text, String::from_utf8_lossy(&bytes));
        }
    }
}
