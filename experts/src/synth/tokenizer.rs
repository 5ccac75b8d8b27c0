//! A vocabulary of the right size that can spell any text: every byte, pairs of letters, and filler words.

use super::shape::Dims;
use crate::gguf::Layout;
use crate::model::Arch;

/// Token types, as llama.cpp counts them.
const NORMAL: i32 = 1;
const UNKNOWN: i32 = 2;
const CONTROL: i32 = 3;
const BYTE: i32 = 6;

pub(super) fn set_metadata(layout: &mut Layout, dims: &Dims) {
    match dims.arch {
        Arch::Llama => sentencepiece(layout, dims.n_vocab),
        Arch::Olmoe => byte_pairs(layout, dims.n_vocab, "olmo"),
        Arch::Qwen2Moe | Arch::Qwen3Moe => byte_pairs(layout, dims.n_vocab, "qwen2"),
    }
}

/// GPT-2's byte-level BPE: 256 bytes, then pairs with their merges, then filler, and the end of text last.
fn byte_pairs(layout: &mut Layout, n_vocab: usize, pre: &str) {
    let mut tokens: Vec<String> = byte_alphabet().map(String::from).collect();
    let mut merges = Vec::new();
    for (a, b) in letter_pairs('Ġ').take(n_vocab.saturating_sub(tokens.len() + 1)) {
        tokens.push(format!("{a}{b}"));
        merges.push(format!("{a} {b}"));
    }
    fill(&mut tokens, n_vocab - 1, 'Ġ');
    tokens.push("<|endoftext|>".to_owned());
    let mut types = vec![NORMAL; n_vocab];
    types[n_vocab - 1] = CONTROL;
    layout.set("tokenizer.ggml.model", "gpt2");
    layout.set("tokenizer.ggml.pre", pre);
    layout.set("tokenizer.ggml.tokens", tokens);
    layout.set("tokenizer.ggml.token_type", types);
    layout.set("tokenizer.ggml.merges", merges);
    layout.set("tokenizer.ggml.bos_token_id", n_vocab as u32 - 1);
    layout.set("tokenizer.ggml.eos_token_id", n_vocab as u32 - 1);
    layout.set("tokenizer.ggml.add_bos_token", false);
}

/// SentencePiece: three special tokens, 256 bytes, printable characters, pairs, then filler.
fn sentencepiece(layout: &mut Layout, n_vocab: usize) {
    let mut tokens: Vec<String> = ["<unk>", "<s>", "</s>"].map(str::to_owned).to_vec();
    tokens.extend((0..=255).map(|byte: u8| format!("<0x{byte:02X}>")));
    let mut types = vec![UNKNOWN, CONTROL, CONTROL];
    types.resize(tokens.len(), BYTE);
    tokens.extend(('!'..='~').chain(['▁']).map(String::from));
    tokens.extend(letter_pairs('▁').map(|(a, b)| format!("{a}{b}")));
    fill(&mut tokens, n_vocab, '▁');
    types.resize(n_vocab, NORMAL);
    // A higher score is merged first.
    let scores: Vec<f32> = (0..n_vocab).map(|id| -(id as f32)).collect();
    layout.set("tokenizer.ggml.model", "llama");
    layout.set("tokenizer.ggml.tokens", tokens);
    layout.set("tokenizer.ggml.token_type", types);
    layout.set("tokenizer.ggml.scores", scores);
    layout.set("tokenizer.ggml.bos_token_id", 1u32);
    layout.set("tokenizer.ggml.eos_token_id", 2u32);
    layout.set("tokenizer.ggml.unknown_token_id", 0u32);
    layout.set("tokenizer.ggml.add_bos_token", true);
}

/// Lower-case letters after a space or another letter.
fn letter_pairs(space: char) -> impl Iterator<Item = (char, char)> {
    [space].into_iter().chain('a'..='z').flat_map(|a| ('a'..='z').map(move |b| (a, b)))
}

fn fill(tokens: &mut Vec<String>, len: usize, space: char) {
    tokens.extend((tokens.len()..len).map(|id| format!("{space}w{id}")));
}

/// The character that GPT-2 writes for each byte: itself if printable, else the next one from U+0100 on
/// (`bytes_to_unicode` in openai/gpt-2, `src/encoder.py`).
fn byte_alphabet() -> impl Iterator<Item = char> {
    let printable = |byte: u8| matches!(byte, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff);
    let mut next = 0x100;
    (0..=255u8).map(move |byte| {
        if printable(byte) {
            return char::from(byte);
        }
        next += 1;
        char::from_u32(next - 1).expect("below the surrogates")
    })
}
