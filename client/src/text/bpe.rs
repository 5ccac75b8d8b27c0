//! Byte-level byte-pair encoding: `tokenizer.ggml.model` = `gpt2`.

use std::collections::HashMap;

use outrigger_experts::gguf::Metadata;
use tokenizers::models::bpe::{BPE, Merges, Vocab as BpeVocab};
use tokenizers::normalizers::NFC;
use tokenizers::pre_tokenizers::PreTokenizerWrapper;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::{SplitDelimiterBehavior, Tokenizer};

use super::TextError;
use super::pre::PreTokenizer;
use super::vocab::{TokenType, Vocab};

const MERGES: &str = "tokenizer.ggml.merges";

/// Hugging Face's own tokenizer, set up as the model's `tokenizer.json` would.
#[derive(Debug)]
pub(super) struct Bpe(Tokenizer);

impl Bpe {
    pub(super) fn new(
        meta: &Metadata,
        vocab: &Vocab,
        pre: &PreTokenizer,
    ) -> Result<Bpe, TextError> {
        let ids: BpeVocab = vocab.ids.iter().map(|(&text, &id)| (text.to_owned(), id)).collect();
        let mut builder = BPE::builder()
            .vocab_and_merges(ids, read_merges(meta, vocab)?)
            .ignore_merges(pre.ignore_merges);
        if let Some(byte) = bytes_of_text().find(|&b| !has_byte(vocab, b)) {
            let unknown = vocab.stand_in(meta, byte)?;
            builder = builder.unk_token(vocab.tokens[unknown as usize].clone());
        }
        let mut tokenizer = Tokenizer::new(builder.build().map_err(TextError::Build)?);
        tokenizer.with_normalizer(pre.nfc.then_some(NFC));
        tokenizer.with_pre_tokenizer(Some(splitter(pre)?));
        Ok(Bpe(tokenizer))
    }

    pub(super) fn encode(&self, text: &str, ids: &mut Vec<u32>) {
        let encoding = self.0.encode_fast(text, false);
        // The one failure there is: a byte without a token and no token to stand in, see `new`.
        ids.extend_from_slice(encoding.expect("every byte of text has a token").get_ids());
    }
}

/// The bytes that a token adds to a text. Each of its characters stands for one byte; where one
/// does not, the text is meant as it is (Hugging Face's `ByteLevel` decoder).
pub(super) fn piece(text: &str, ty: TokenType) -> Vec<u8> {
    match ty {
        TokenType::Control | TokenType::Unknown | TokenType::Unused => Vec::new(),
        TokenType::UserDefined => text.into(),
        TokenType::Normal | TokenType::Byte => {
            text.chars().map(byte_of_char).collect::<Option<_>>().unwrap_or_else(|| text.into())
        }
    }
}

fn splitter(pre: &PreTokenizer) -> Result<Sequence, TextError> {
    let split = |&pattern: &&str| {
        let pattern = SplitPattern::Regex(pattern.to_owned());
        let split = Split::new(pattern, SplitDelimiterBehavior::Isolated, false);
        split.map(PreTokenizerWrapper::from).map_err(TextError::Build)
    };
    let mut steps = pre.patterns.iter().map(split).collect::<Result<Vec<_>, _>>()?;
    steps.push(ByteLevel::new(false, true, false).into());
    Ok(Sequence::new(steps))
}

/// The merges, first to last: each two tokens whose texts together are a token.
fn read_merges(meta: &Metadata, vocab: &Vocab) -> Result<Merges, TextError> {
    let merges = meta
        .strings(MERGES)?
        .ok_or_else(|| meta.mismatch(MERGES, "no such key", "an array of strings"))?;
    let is_token = |text: &str| vocab.ids.contains_key(text);
    let read = |(index, merge): (usize, &String)| match merge.split_once(' ') {
        Some((left, right))
            if is_token(left) && is_token(right) && is_token(&[left, right].concat()) =>
        {
            Ok((left.to_owned(), right.to_owned()))
        }
        _ => {
            let found = format!("{merge:?} as merge {index}");
            let expected = "two tokens, a space between them, that together are a token";
            Err(meta.mismatch(MERGES, found, expected).into())
        }
    };
    merges.iter().enumerate().map(read).collect()
}

/// The bytes that occur in UTF-8.
fn bytes_of_text() -> impl Iterator<Item = u8> {
    (0..=0xF4).filter(|b| !matches!(b, 0xC0 | 0xC1))
}

fn has_byte(vocab: &Vocab, byte: u8) -> bool {
    vocab.ids.contains_key(char_of_byte(byte).encode_utf8(&mut [0; 4]) as &str)
}

/// GPT-2's printable stand-in for a byte: itself where it is printable in Latin-1, and the rest
/// from U+0100 on, in order (`bytes_to_unicode` in GPT-2's `encoder.py`).
fn char_of_byte(byte: u8) -> char {
    let below = |end: u8| (0..end).filter(|&b| !is_printable(b)).count() as u32;
    if is_printable(byte) {
        byte.into()
    } else {
        char::from_u32(0x100 + below(byte)).expect("at most 68 beyond U+0100")
    }
}

fn is_printable(byte: u8) -> bool {
    matches!(byte, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF)
}

fn byte_of_char(c: char) -> Option<u8> {
    static BYTES: std::sync::LazyLock<HashMap<char, u8>> =
        std::sync::LazyLock::new(|| (0..=255).map(|b| (char_of_byte(b), b)).collect());
    BYTES.get(&c).copied()
}

#[cfg(test)]
mod tests {
    use tokenizers::{OffsetReferential, OffsetType, PreTokenizedString, PreTokenizer as _};

    use super::*;

    /// Cases by Hugging Face's Python package: `tools/make_tokenizer_fixtures.py`.
    #[test]
    fn texts_are_cut_as_by_the_original_expressions() {
        let path =
            concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/fixtures/tokenizer/pretokenize.json");
        let file = std::fs::read(path).expect("a fixture");
        let cases: serde_json::Value = serde_json::from_slice(&file).expect("JSON");
        let mut names = Vec::new();
        for (name, cases) in cases.as_object().expect("an object") {
            names.push(name.as_str());
            let splitter = splitter(PreTokenizer::named(name).expect("known")).expect("built");
            for case in cases.as_array().expect("cases") {
                let text = case["text"].as_str().expect("a text");
                let mut cut = PreTokenizedString::from(text);
                splitter.pre_tokenize(&mut cut).expect("cut");
                let pieces: Vec<&str> = cut
                    .get_splits(OffsetReferential::Original, OffsetType::Byte)
                    .into_iter()
                    .map(|(_, (start, end), _)| &text[start..end])
                    .collect();
                let expected = case["pieces"].as_array().expect("pieces");
                let expected: Vec<_> = expected.iter().map(|p| p.as_str().expect("text")).collect();
                assert_eq!(pieces, expected, "{name}: {text:?}");
            }
        }
        assert_eq!(names, ["dbrx", "default", "gpt-2", "llama-bpe", "olmo", "qwen2"]);
    }

    #[test]
    fn the_byte_alphabet_is_gpt2s() {
        // Values of `bytes_to_unicode()`.
        for (byte, c) in [(0, 'Ā'), (b'\n', 'Ċ'), (b' ', 'Ġ'), (b'!', '!'), (0x7F, 'ġ')] {
            assert_eq!((char_of_byte(byte), byte_of_char(c)), (c, Some(byte)));
        }
        for (byte, c) in [(0xA0, 'ł'), (0xAD, 'Ń'), (0xFF, 'ÿ')] {
            assert_eq!((char_of_byte(byte), byte_of_char(c)), (c, Some(byte)));
        }
        assert_eq!(byte_of_char(' '), None);
    }

    #[test]
    fn the_alphabet_is_the_librarys() {
        let ours: std::collections::BTreeSet<char> = (0..=255).map(char_of_byte).collect();
        assert_eq!(ours, ByteLevel::alphabet().into_iter().collect());
    }
}
