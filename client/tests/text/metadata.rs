//! Metadata that is missing or contradicts itself: an error that names the key.

use std::error::Error;

use outrigger::text::Tokenizer;

use crate::gguf::Keys;

const BPE: &str = "gpt2";

/// Byte-level BPE of the 256 bytes, then `ab`, then `<|end|>`.
fn bpe() -> Keys {
    // GPT-2's alphabet: printable bytes are themselves, the others follow from U+0100 on.
    let printable = |b: u32| matches!(b, 0x21..=0x7E | 0xA1..=0xAC | 0xAE..=0xFF);
    let others =
        (0x100..0x100 + (0..256).filter(|&b| !printable(b)).count() as u32).collect::<Vec<_>>();
    let chars = (0..256).filter(|&b| printable(b)).chain(others);
    let mut tokens: Vec<String> = chars.map(|c| char::from_u32(c).unwrap().to_string()).collect();
    tokens.extend(["ab".to_owned(), "<|end|>".to_owned()]);
    let mut types = vec![1; tokens.len()];
    types[257] = 3;
    Keys::default()
        .str("tokenizer.ggml.model", BPE)
        .str("tokenizer.ggml.pre", "gpt-2")
        .strings("tokenizer.ggml.tokens", &tokens)
        .i32s("tokenizer.ggml.token_type", &types)
        .strings("tokenizer.ggml.merges", &["a b"])
        .u32("tokenizer.ggml.eos_token_id", 257)
}

/// SentencePiece of a few letters, with and without `bytes`.
fn spm(bytes: bool) -> Keys {
    let mut tokens: Vec<String> =
        ["<unk>", "<s>", "</s>", "\u{2581}", "a", "b", "ab", "ba", "\u{2581}a"]
            .map(String::from)
            .into();
    let mut types = vec![2, 3, 3, 1, 1, 1, 1, 1, 1];
    let mut scores = vec![0.0, 0.0, 0.0, -9.0, -9.0, -9.0, -2.0, -2.0, -3.0];
    if bytes {
        tokens.extend((0..256).map(|b| format!("<0x{b:02X}>")));
        types.extend([6; 256]);
        scores.extend([0.0; 256]);
    }
    Keys::default()
        .str("tokenizer.ggml.model", "llama")
        .strings("tokenizer.ggml.tokens", &tokens)
        .i32s("tokenizer.ggml.token_type", &types)
        .f32s("tokenizer.ggml.scores", &scores)
}

fn build(keys: &Keys) -> Tokenizer {
    Tokenizer::from_gguf(&keys.metadata()).expect("a tokenizer")
}

#[track_caller]
fn refused(keys: Keys, expected: &[&str]) {
    let error = Tokenizer::from_gguf(&keys.metadata()).expect_err("refused");
    let mut message = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        message = format!("{message}: {error}");
        cause = error.source();
    }
    for part in expected {
        assert!(message.contains(part), "{message:?} names {part:?}");
    }
}

#[test]
fn the_small_vocabularies_work() {
    let tokenizer = build(&bpe());
    assert_eq!(tokenizer.encode("ab", false, true), [256]);
    assert_eq!(tokenizer.decode(&tokenizer.encode("naïve ab\0", false, true)), "naïve ab\0");
    let tokenizer = build(&spm(true));
    // `▁a` scores less than `ab` and `ba`; of those, equal, the leftmost is first.
    assert_eq!(tokenizer.encode("aba", false, false), [3, 6, 4]);
    assert_eq!(tokenizer.encode("a", false, false), [8]);
    assert_eq!(tokenizer.encode("c", false, false), [3, 9 + u32::from(b'c')]);
}

#[test]
fn keys_that_are_missing_or_of_another_type() {
    refused(Keys::default(), &["test.gguf", "tokenizer.ggml.model", "no such key"]);
    refused(bpe().without("tokenizer.ggml.tokens"), &["tokenizer.ggml.tokens", "no such key"]);
    refused(bpe().without("tokenizer.ggml.merges"), &["tokenizer.ggml.merges", "no such key"]);
    refused(spm(true).without("tokenizer.ggml.scores"), &["tokenizer.ggml.scores", "no such key"]);
    refused(bpe().str("tokenizer.ggml.tokens", "?"), &["tokenizer.ggml.tokens", "strings"]);
    refused(bpe().u32("tokenizer.ggml.pre", 2), &["tokenizer.ggml.pre", "a string"]);
}

#[test]
fn kinds_that_are_not_known() {
    refused(bpe().str("tokenizer.ggml.model", "t5"), &["tokenizer.ggml.model", "\"t5\"", "llama"]);
    refused(bpe().str("tokenizer.ggml.pre", "gpt-9"), &["\"gpt-9\"", "qwen2", "olmo", "default"]);
}

#[test]
fn arrays_of_another_length() {
    let types = "tokenizer.ggml.token_type";
    refused(bpe().i32s(types, &[1; 257]), &[types, "257", "258"]);
    refused(spm(true).f32s("tokenizer.ggml.scores", &[]), &["tokenizer.ggml.scores", "0 values"]);
}

#[test]
fn values_that_cannot_be() {
    let (mut types, tokens) = ([1; 258], "tokenizer.ggml.tokens");
    types[7] = 9;
    refused(bpe().i32s("tokenizer.ggml.token_type", &types), &["tokenizer.ggml.token_type", "9"]);
    refused(spm(true).strings(tokens, &["a"; 265]), &[tokens, "\"a\" as token 0 and as token 1"]);
    let scores = [f32::NAN; 265];
    refused(spm(true).f32s("tokenizer.ggml.scores", &scores), &["tokenizer.ggml.scores", "NaN"]);
    for key in ["bos", "eos", "eot", "eom", "unknown"] {
        let key = format!("tokenizer.ggml.{key}_token_id");
        refused(bpe().u32(&key, 258), &[&key, "258"]);
    }
    refused(bpe().bool("tokenizer.ggml.add_bos_token", true), &["add_bos_token", "bos_token_id"]);
    let mut texts = vec!["<0x0>".to_owned()];
    texts.extend((1..265).map(|i| i.to_string()));
    let byte = [6; 265];
    let keys = spm(true).strings(tokens, &texts).i32s("tokenizer.ggml.token_type", &byte);
    refused(keys, &[tokens, "\"<0x0>\" as byte token 0"]);
}

#[test]
fn merges_that_are_none() {
    for bad in ["ab", "a", "a x y", "a zz", "b a", "", " "] {
        let keys = bpe().strings("tokenizer.ggml.merges", &["a b", bad]);
        refused(keys, &["tokenizer.ggml.merges", "as merge 1", &format!("{bad:?}")]);
    }
}

#[test]
fn bytes_without_a_token_need_one_that_stands_in() {
    let few = |keys: Keys| {
        keys.strings("tokenizer.ggml.tokens", &["a", "b", "ab", "?"])
            .i32s("tokenizer.ggml.token_type", &[1, 1, 1, 2])
            .without("tokenizer.ggml.eos_token_id")
    };
    refused(few(bpe()), &["tokenizer.ggml.tokens", "byte 0x00", "unknown_token_id"]);
    let tokenizer = build(&few(bpe()).u32("tokenizer.ggml.unknown_token_id", 3));
    assert_eq!(tokenizer.encode("abcb", false, false), [2, 3, 1]);
    assert_eq!(tokenizer.decode(&[2, 3, 1]), "abb", "an unknown token has no text");
    let tokenizer = build(&spm(false));
    assert_eq!(tokenizer.encode("ac", false, false), [8, 0]);
}

#[test]
fn the_file_decides_about_bos_and_the_space_before() {
    assert_eq!(build(&spm(true)).encode("a", false, true), [1, 8]);
    let no_bos = spm(true).bool("tokenizer.ggml.add_bos_token", false);
    assert_eq!(build(&no_bos).encode("a", false, true), [8]);
    let no_space = build(&spm(true).bool("tokenizer.ggml.add_space_prefix", false));
    assert_eq!(no_space.encode("a", false, true), [1, 4]);
    assert_eq!(no_space.decode(&[3, 4]), " a");
    let llama3 = bpe().str("tokenizer.ggml.pre", "llama-bpe").u32("tokenizer.ggml.bos_token_id", 0);
    assert_eq!(build(&llama3).encode("ab", false, true), [0, 256]);
}

#[test]
fn ends_are_known_by_text_too_and_user_defined_tokens_always_match() {
    let mut types = [1; 258];
    types[256] = 4;
    let keys = bpe().i32s("tokenizer.ggml.token_type", &types);
    let tokenizer = build(&keys.without("tokenizer.ggml.eos_token_id"));
    assert!(tokenizer.is_end(257));
    assert_eq!(tokenizer.piece(257), b"", "it is a control token");
    assert_eq!(tokenizer.encode("xabx", false, false)[1], 256);
    assert_eq!(tokenizer.decode(&[256]), "ab");
}
