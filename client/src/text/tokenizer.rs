//! Text to token ids and back.

use aho_corasick::{AhoCorasick, MatchKind};
use outrigger_experts::gguf::Metadata;

use super::TextError;
use super::bpe::{self, Bpe};
use super::pre::PreTokenizer;
use super::spm::{self, Spm};
use super::vocab::{TokenType, Vocab};

const MODEL: &str = "tokenizer.ggml.model";
const PRE: &str = "tokenizer.ggml.pre";

/// The tokenizer of a model file. Immutable: share it between threads.
///
/// Ids beyond the file's vocabulary, which a model with a padded one may produce, stand for no text.
#[derive(Debug)]
pub struct Tokenizer {
    model: Model,
    pieces: Pieces,
    /// Tokens that are matched in a text before anything else is.
    special: Matcher,
    user_defined: Matcher,
    bos: Option<u32>,
    ends: Vec<u32>,
    add_bos: bool,
}

#[derive(Debug)]
enum Model {
    Bpe(Box<Bpe>),
    Spm(Box<Spm>),
}

impl Tokenizer {
    /// Builds the tokenizer that the metadata describes.
    ///
    /// # Errors
    /// A kind of tokenizer that is not supported, or metadata that is missing or contradicts itself;
    /// the message names the key.
    pub fn from_gguf(meta: &Metadata) -> Result<Tokenizer, TextError> {
        let kind = meta.require_str(MODEL)?;
        if !matches!(kind, "gpt2" | "llama") {
            return Err(meta.mismatch(MODEL, format!("{kind:?}"), "gpt2 or llama").into());
        }
        let vocab = Vocab::read(meta, kind == "llama")?;
        let (model, add_bos, piece): (_, _, fn(&str, TokenType) -> Vec<u8>) = if kind == "gpt2" {
            let name = meta.str(PRE)?.unwrap_or("default");
            let pre = PreTokenizer::named(name).ok_or_else(|| {
                let expected = format!("one of {}", PreTokenizer::known());
                meta.mismatch(PRE, format!("{name:?}"), expected)
            })?;
            (Model::Bpe(Box::new(Bpe::new(meta, &vocab, pre)?)), pre.add_bos, bpe::piece)
        } else {
            (Model::Spm(Box::new(Spm::new(meta, &vocab)?)), true, spm::piece)
        };
        Ok(Tokenizer {
            model,
            pieces: vocab.iter().map(|(_, text, ty)| piece(text, ty)).collect(),
            special: Matcher::new(&vocab, |ty| {
                matches!(ty, TokenType::Control | TokenType::Unknown | TokenType::UserDefined)
            })?,
            user_defined: Matcher::new(&vocab, |ty| ty == TokenType::UserDefined)?,
            add_bos: read_add_bos(meta, vocab.bos)?.unwrap_or(add_bos),
            bos: vocab.bos,
            ends: vocab.ends,
        })
    }

    /// The tokens of a text.
    ///
    /// `parse_special`: the texts of control tokens (`<|im_start|>`) become those tokens. Right for
    /// a prompt that a template wrote; wrong for text that somebody else did.
    /// `add_bos`: start with the BOS token if the model's texts do and this one does not yet.
    pub fn encode(&self, text: &str, parse_special: bool, add_bos: bool) -> Vec<u32> {
        let matcher = if parse_special { &self.special } else { &self.user_defined };
        let mut ids = Vec::new();
        let mut rest = 0;
        for (range, id) in matcher.find_iter(text) {
            self.encode_plain(&text[rest..range.start], &mut ids);
            ids.push(id);
            rest = range.end;
        }
        self.encode_plain(&text[rest..], &mut ids);

        if add_bos && self.add_bos && ids.first() != self.bos.as_ref() {
            ids.splice(..0, self.bos);
        }
        ids
    }

    /// The text of tokens. Control tokens have none; bytes that are no UTF-8 are U+FFFD; a space
    /// that [`encode`](Tokenizer::encode) put before the text is taken off.
    ///
    /// To decode the continuation of a text, where that space is meant, or token by token, use a
    /// [`StreamDecoder`](super::StreamDecoder).
    pub fn decode(&self, ids: &[u32]) -> String {
        let bytes: Vec<u8> = ids.iter().flat_map(|&id| self.piece(id)).copied().collect();
        let text = match &self.model {
            Model::Spm(spm) if spm.adds_space_prefix() => bytes.strip_prefix(b" "),
            _ => None,
        };
        String::from_utf8_lossy(text.unwrap_or(&bytes)).into_owned()
    }

    /// The bytes that a token adds to a text: none for control tokens, perhaps part of a character.
    pub fn piece(&self, id: u32) -> &[u8] {
        self.pieces.get(id)
    }

    /// Whether generation is over with this token: the end of a text, a turn or a message.
    pub fn is_end(&self, id: u32) -> bool {
        self.ends.binary_search(&id).is_ok()
    }

    /// Appends the tokens of a text without special tokens.
    fn encode_plain(&self, text: &str, ids: &mut Vec<u32>) {
        match &self.model {
            Model::Bpe(bpe) => bpe.encode(text, ids),
            Model::Spm(spm) => spm.encode(text, ids),
        }
    }
}

fn read_add_bos(meta: &Metadata, bos: Option<u32>) -> Result<Option<bool>, TextError> {
    const KEY: &str = "tokenizer.ggml.add_bos_token";
    match meta.bool(KEY)? {
        Some(true) if bos.is_none() => {
            let expected = "false, or a `tokenizer.ggml.bos_token_id`";
            Err(meta.mismatch(KEY, "true", expected).into())
        }
        add => Ok(add),
    }
}

/// Every token's bytes, end to end.
#[derive(Debug)]
struct Pieces {
    bytes: Vec<u8>,
    /// Where each token's end.
    ends: Vec<usize>,
}

impl Pieces {
    fn get(&self, id: u32) -> &[u8] {
        let id = id as usize;
        let start = if id == 0 { Some(0) } else { self.ends.get(id - 1).copied() };
        match (start, self.ends.get(id)) {
            (Some(start), Some(&end)) => &self.bytes[start..end],
            _ => &[],
        }
    }
}

impl FromIterator<Vec<u8>> for Pieces {
    fn from_iter<I: IntoIterator<Item = Vec<u8>>>(pieces: I) -> Pieces {
        let (mut bytes, mut ends) = (Vec::new(), Vec::new());
        for piece in pieces {
            bytes.extend_from_slice(&piece);
            ends.push(bytes.len());
        }
        Pieces { bytes, ends }
    }
}

/// Finds tokens in a text by their own text, the leftmost first and of those the longest.
#[derive(Debug)]
struct Matcher {
    automaton: AhoCorasick,
    ids: Vec<u32>,
}

impl Matcher {
    fn new(vocab: &Vocab, wanted: impl Fn(TokenType) -> bool) -> Result<Matcher, TextError> {
        let (texts, ids): (Vec<&str>, Vec<u32>) = vocab
            .iter()
            .filter(|(_, text, ty)| wanted(*ty) && !text.is_empty())
            .map(|(id, text, _)| (text, id))
            .unzip();
        let automaton = AhoCorasick::builder()
            .match_kind(MatchKind::LeftmostLongest)
            .build(texts)
            .map_err(|error| TextError::Build(error.into()))?;
        Ok(Matcher { automaton, ids })
    }

    fn find_iter(&self, text: &str) -> impl Iterator<Item = (std::ops::Range<usize>, u32)> {
        self.automaton.find_iter(text).map(|m| (m.range(), self.ids[m.pattern()]))
    }
}
