//! `tokenizer.ggml.*` read and checked: from here on every token has a type and every id exists.

use std::collections::HashMap;

use outrigger_experts::gguf::Metadata;

use super::TextError;

const TOKENS: &str = "tokenizer.ggml.tokens";
const TYPES: &str = "tokenizer.ggml.token_type";
const UNKNOWN: &str = "tokenizer.ggml.unknown_token_id";

/// Tokens that end an answer by their very text, as in llama.cpp's `llama-vocab.cpp`: files often
/// name only one of several as EOS, and some do not even mark the others as control tokens.
const END_TEXTS: [&str; 7] = [
    "<|eot_id|>",
    "<|eom_id|>",
    "<|im_end|>",
    "<|end|>",
    "<|endoftext|>",
    "<end_of_turn>",
    "<EOT>",
];

/// What a token is for: `tokenizer.ggml.token_type`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum TokenType {
    /// A piece of text.
    Normal,
    /// Stands for text that no token covers; never printed.
    Unknown,
    /// Structure (start, end, roles): matched in prompts, never printed.
    Control,
    /// Text that is always one token.
    UserDefined,
    /// A place without a meaning.
    Unused,
    /// One byte (`<0x0A>`), for text that no other token covers.
    Byte,
}

impl TokenType {
    fn from_id(id: i32) -> Option<TokenType> {
        Some(match id {
            1 => TokenType::Normal,
            2 => TokenType::Unknown,
            3 => TokenType::Control,
            4 => TokenType::UserDefined,
            // 0 is "undefined".
            0 | 5 => TokenType::Unused,
            6 => TokenType::Byte,
            _ => return None,
        })
    }
}

/// The checked vocabulary, while a tokenizer is built from it.
#[derive(Debug)]
pub(super) struct Vocab<'a> {
    pub(super) tokens: &'a [String],
    pub(super) types: Vec<TokenType>,
    /// Each token that has a text, by it.
    pub(super) ids: HashMap<&'a str, u32>,
    pub(super) bos: Option<u32>,
    pub(super) unknown: Option<u32>,
    /// Every token that ends an answer, ascending.
    pub(super) ends: Vec<u32>,
}

impl<'a> Vocab<'a> {
    pub(super) fn read(meta: &'a Metadata, sentencepiece: bool) -> Result<Vocab<'a>, TextError> {
        let tokens = meta
            .strings(TOKENS)?
            .ok_or_else(|| meta.mismatch(TOKENS, "no such key", "an array of strings"))?;
        let ids = index(meta, tokens)?;
        let mut types = read_types(meta, tokens.len())?;

        let id = |key, default| read_id(meta, key, tokens.len(), default);
        // SentencePiece's own numbers, where the file does not say.
        let bos = id("tokenizer.ggml.bos_token_id", sentencepiece.then_some(1))?;
        let eos = id("tokenizer.ggml.eos_token_id", sentencepiece.then_some(2))?;
        let unknown = id(UNKNOWN, sentencepiece.then_some(0))?;
        let eot = id("tokenizer.ggml.eot_token_id", None)?;
        let eom = id("tokenizer.ggml.eom_token_id", None)?;

        let mut ends: Vec<u32> =
            END_TEXTS.iter().filter_map(|text| ids.get(text).copied()).collect();
        for &end in &ends {
            types[end as usize] = TokenType::Control;
        }
        ends.extend([eos, eot, eom].into_iter().flatten());
        ends.sort_unstable();
        ends.dedup();
        Ok(Vocab { tokens, types, ids, bos, unknown, ends })
    }

    /// Each token with its id and type.
    pub(super) fn iter(&self) -> impl Iterator<Item = (u32, &'a str, TokenType)> {
        let texts = self.tokens.iter().map(String::as_str);
        (0..).zip(texts).zip(&self.types).map(|((id, text), &ty)| (id, text, ty))
    }

    /// The token that stands in where no token is for `byte`.
    ///
    /// # Errors
    /// If there is none: some text could not be encoded at all.
    pub(super) fn stand_in(&self, meta: &Metadata, byte: u8) -> Result<u32, TextError> {
        self.unknown.ok_or_else(|| {
            let found = format!("no token for the byte 0x{byte:02X}");
            meta.mismatch(TOKENS, found, format!("one, or a `{UNKNOWN}`")).into()
        })
    }
}

/// Tokens by text. Empty ones are places that nothing can match; of two with one text, nothing
/// could ever encode to the other.
fn index<'a>(meta: &Metadata, tokens: &'a [String]) -> Result<HashMap<&'a str, u32>, TextError> {
    let mut ids = HashMap::with_capacity(tokens.len());
    for (id, token) in (0u32..).zip(tokens).filter(|(_, token)| !token.is_empty()) {
        if let Some(first) = ids.insert(token.as_str(), id) {
            let found = format!("{token:?} as token {first} and as token {id}");
            return Err(meta.mismatch(TOKENS, found, "each text once").into());
        }
    }
    Ok(ids)
}

fn read_types(meta: &Metadata, tokens: usize) -> Result<Vec<TokenType>, TextError> {
    let Some(ids) = meta.i32s(TYPES)? else { return Ok(vec![TokenType::Normal; tokens]) };
    check_len(meta, TYPES, ids.len(), tokens)?;
    let ty = |id| {
        TokenType::from_id(id)
            .ok_or_else(|| meta.mismatch(TYPES, id.to_string(), "a token type from 0 to 6").into())
    };
    ids.into_iter().map(ty).collect()
}

/// That an array has one value a token.
pub(super) fn check_len(
    meta: &Metadata,
    key: &str,
    found: usize,
    tokens: usize,
) -> Result<(), TextError> {
    if found == tokens {
        return Ok(());
    }
    let expected = format!("{tokens}, one for each of `{TOKENS}`");
    Err(meta.mismatch(key, format!("{found} values"), expected).into())
}

/// The token id at `key`; where the file does not say, `default` if there is such a token.
fn read_id(
    meta: &Metadata,
    key: &str,
    tokens: usize,
    default: Option<u32>,
) -> Result<Option<u32>, TextError> {
    let exists = |id: u32| (id as usize) < tokens;
    match meta.u32(key)? {
        Some(id) if exists(id) => Ok(Some(id)),
        Some(id) => Err(meta.mismatch(key, id.to_string(), format!("an id below {tokens}")).into()),
        None => Ok(default.filter(|&id| exists(id))),
    }
}
