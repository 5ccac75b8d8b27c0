//! How a byte-level BPE tokenizer splits text into words before it merges: `tokenizer.ggml.pre`.

/// One way to split.
#[derive(Debug)]
pub(super) struct PreTokenizer {
    /// The values of `tokenizer.ggml.pre` that mean it.
    pub(super) names: &'static [&'static str],
    /// Applied one after the other: each splits the pieces that the one before left.
    pub(super) patterns: &'static [&'static str],
    /// Text is brought into Unicode's NFC first, as these models' own tokenizers do.
    pub(super) nfc: bool,
    /// A word that is a token as a whole is that token, whatever the merges say.
    pub(super) ignore_merges: bool,
    /// A text starts with the BOS token unless the file says otherwise.
    pub(super) add_bos: bool,
}

// The expressions are those of each model's tokenizer.json; llama.cpp's `llama-vocab.cpp` maps the
// names to them. Where its expressions leave out a last `|\s+`, what it would match is split off
// all the same, as text between matches.
const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";
const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN2: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

const TABLE: &[PreTokenizer] = &[
    PreTokenizer {
        names: &["default"],
        patterns: &[r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"],
        nfc: false,
        ignore_merges: false,
        add_bos: false,
    },
    PreTokenizer {
        names: &["gpt-2"],
        patterns: &[GPT2],
        nfc: false,
        ignore_merges: false,
        add_bos: false,
    },
    PreTokenizer {
        names: &["olmo"],
        patterns: &[GPT2],
        nfc: true,
        ignore_merges: false,
        add_bos: false,
    },
    PreTokenizer {
        names: &["qwen2"],
        patterns: &[QWEN2],
        nfc: true,
        ignore_merges: false,
        add_bos: false,
    },
    PreTokenizer {
        names: &["llama-bpe", "llama3", "llama-v3"],
        patterns: &[LLAMA3],
        nfc: false,
        ignore_merges: true,
        add_bos: true,
    },
    PreTokenizer {
        names: &["dbrx", "smaug-bpe"],
        patterns: &[LLAMA3],
        nfc: false,
        ignore_merges: false,
        add_bos: false,
    },
];

impl PreTokenizer {
    /// The one that this name means.
    pub(super) fn named(name: &str) -> Option<&'static PreTokenizer> {
        TABLE.iter().find(|pre| pre.names.contains(&name))
    }

    /// Every name that is known, for messages.
    pub(super) fn known() -> String {
        TABLE.iter().flat_map(|pre| pre.names).copied().collect::<Vec<_>>().join(", ")
    }
}
