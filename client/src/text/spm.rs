//! SentencePiece's merging by score, with bytes for what is left: `tokenizer.ggml.model` = `llama`.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};

use outrigger_experts::gguf::Metadata;

use super::TextError;
use super::vocab::{TokenType, Vocab, check_len};

const TOKENS: &str = "tokenizer.ggml.tokens";
const SCORES: &str = "tokenizer.ggml.scores";
/// SentencePiece writes a space as U+2581.
const SPACE: char = '\u{2581}';

/// Neighbours merge into the token of the highest score, the leftmost of equals first, until none
/// do (`bpe_model.cc` of SentencePiece; `llm_tokenizer_spm` of llama.cpp).
#[derive(Debug)]
pub(super) struct Spm {
    /// The tokens that text can merge into. Control tokens are not among them: no text that a user
    /// types merges into one.
    tokens: HashMap<Box<str>, Token>,
    /// For each byte its token.
    bytes: [u32; 256],
    /// A text starts as if a space were before it; so does what follows a special token.
    add_space_prefix: bool,
}

#[derive(Clone, Copy, Debug)]
struct Token {
    id: u32,
    score: f32,
}

impl Spm {
    pub(super) fn new(meta: &Metadata, vocab: &Vocab) -> Result<Spm, TextError> {
        let scores = meta
            .f32s(SCORES)?
            .ok_or_else(|| meta.mismatch(SCORES, "no such key", "an array of f32"))?;
        check_len(meta, SCORES, scores.len(), vocab.tokens.len())?;
        if let Some(id) = scores.iter().position(|score| score.is_nan()) {
            return Err(meta.mismatch(SCORES, format!("NaN for token {id}"), "numbers").into());
        }
        let tokens = vocab
            .iter()
            .filter(|(_, text, ty)| *ty == TokenType::Normal && !text.is_empty())
            .map(|(id, text, _)| (text.into(), Token { id, score: scores[id as usize] }))
            .collect();
        Ok(Spm {
            tokens,
            bytes: byte_tokens(meta, vocab)?,
            add_space_prefix: meta.bool("tokenizer.ggml.add_space_prefix")?.unwrap_or(true),
        })
    }

    /// Whether decoding takes one space off the start of a text that encoding put there.
    pub(super) fn adds_space_prefix(&self) -> bool {
        self.add_space_prefix
    }

    /// Appends the tokens of a text without special tokens.
    pub(super) fn encode(&self, text: &str, ids: &mut Vec<u32>) {
        if text.is_empty() {
            return;
        }
        let prefix = if self.add_space_prefix { " " } else { "" };
        let text = [prefix, text].concat().replace(' ', SPACE.encode_utf8(&mut [0; 4]));
        for symbol in self.merge(&text) {
            match self.tokens.get(symbol) {
                Some(token) => ids.push(token.id),
                None => ids.extend(symbol.bytes().map(|b| self.bytes[b as usize])),
            }
        }
    }

    /// The parts of `text` that no further merge joins, in order. O(n log n).
    fn merge<'t>(&self, text: &'t str) -> impl Iterator<Item = &'t str> {
        let mut symbols: Vec<Symbol> = text
            .char_indices()
            .enumerate()
            .map(|(i, (start, c))| Symbol {
                start,
                len: c.len_utf8(),
                prev: i.checked_sub(1),
                next: Some(i + 1),
            })
            .collect();
        if let Some(last) = symbols.last_mut() {
            last.next = None;
        }

        let mut pairs = BinaryHeap::new();
        for left in 1..symbols.len() {
            pairs.extend(self.pair(text, &symbols, Some(left - 1), Some(left)));
        }
        while let Some(Pair { left: Reverse(left), right, len, .. }) = pairs.pop() {
            // Either symbol may have merged with another since the pair was made.
            if symbols[left].len == 0
                || symbols[right].len == 0
                || symbols[left].len + symbols[right].len != len
            {
                continue;
            }
            let after = symbols[right].next;
            symbols[left].len = len;
            symbols[left].next = after;
            symbols[right].len = 0;
            if let Some(after) = after {
                symbols[after].prev = Some(left);
            }
            pairs.extend(self.pair(text, &symbols, symbols[left].prev, Some(left)));
            pairs.extend(self.pair(text, &symbols, Some(left), after));
        }
        symbols.into_iter().filter(|s| s.len > 0).map(|s| &text[s.start..s.start + s.len])
    }

    /// The pair of these neighbours, if together they are a token.
    fn pair(
        &self,
        text: &str,
        symbols: &[Symbol],
        left: Option<usize>,
        right: Option<usize>,
    ) -> Option<Pair> {
        let (left, right) = (left?, right?);
        let start = symbols[left].start;
        let len = symbols[left].len + symbols[right].len;
        let token = self.tokens.get(&text[start..start + len])?;
        Some(Pair { score: Score(token.score), left: Reverse(left), right, len })
    }
}

/// A run of the text: characters first, longer with every merge. `len` 0: merged into another.
struct Symbol {
    start: usize,
    len: usize,
    prev: Option<usize>,
    next: Option<usize>,
}

/// Neighbours that can merge, ordered by how soon they do.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
struct Pair {
    score: Score,
    left: Reverse<usize>,
    right: usize,
    /// Bytes of both when the pair was made.
    len: usize,
}

#[derive(PartialEq)]
struct Score(f32);

impl Eq for Score {}

impl PartialOrd for Score {
    fn partial_cmp(&self, other: &Score) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Score {
    fn cmp(&self, other: &Score) -> std::cmp::Ordering {
        // Numbers, see `Spm::new`; and -0 equals 0 as in the reference.
        self.0.partial_cmp(&other.0).expect("no NaN")
    }
}

/// The bytes that a token adds to a text.
pub(super) fn piece(text: &str, ty: TokenType) -> Vec<u8> {
    match ty {
        TokenType::Control | TokenType::Unknown | TokenType::Unused => Vec::new(),
        TokenType::UserDefined => text.into(),
        TokenType::Normal => text.replace(SPACE, " ").into(),
        TokenType::Byte => byte_of_text(text).into_iter().collect(),
    }
}

/// `<0x0A>` is the byte 10.
fn byte_of_text(text: &str) -> Option<u8> {
    let hex = text.strip_prefix("<0x")?.strip_suffix('>')?;
    (hex.len() == 2).then(|| u8::from_str_radix(hex, 16).ok())?
}

fn byte_tokens(meta: &Metadata, vocab: &Vocab) -> Result<[u32; 256], TextError> {
    let mut tokens = [None; 256];
    for (id, text, _) in vocab.iter().filter(|(_, _, ty)| *ty == TokenType::Byte) {
        let byte = byte_of_text(text).ok_or_else(|| {
            let found = format!("{text:?} as byte token {id}");
            meta.mismatch(TOKENS, found, "<0x00> to <0xFF>")
        })?;
        tokens[byte as usize] = Some(id);
    }
    let mut bytes = [0; 256];
    for (byte, token) in (0u8..=255).zip(tokens) {
        bytes[byte as usize] = match token {
            Some(id) => id,
            None => vocab.stand_in(meta, byte)?,
        };
    }
    Ok(bytes)
}
