//! Encoding and decoding. Expected ids: `tools/make_tokenizer_fixtures.py`.

use outrigger::text::{StreamDecoder, Tokenizer};
use outrigger_experts::gguf::Gguf;
use serde_json::Value;

use crate::gguf::repository;

const SPECIAL: [&str; 3] = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"];

fn open(path: &str) -> Tokenizer {
    let gguf = Gguf::open(&repository(path)).expect("a model file");
    Tokenizer::from_gguf(gguf.meta()).expect("a tokenizer")
}

/// Each text with its ids.
fn cases(path: &str) -> Vec<(String, Vec<u32>)> {
    let file = std::fs::read(repository(path)).expect("a fixture");
    let cases: Vec<Value> = serde_json::from_slice(&file).expect("JSON");
    assert!(cases.len() > 40, "{path} has its cases");
    let read = |case: &Value| {
        // Ours normalises, as the model's own tokenizer does.
        let ids = case.get("nfc_ids").unwrap_or(&case["ids"]);
        let ids = ids.as_array().expect("ids").iter();
        let text = case["text"].as_str().expect("a text");
        (text.to_owned(), ids.map(|id| id.as_u64().expect("an id") as u32).collect())
    };
    cases.iter().map(read).collect()
}

fn stream(tokenizer: &Tokenizer, ids: &[u32]) -> String {
    let mut decoder = StreamDecoder::new();
    let mut text: String = ids.iter().map(|&id| decoder.push(tokenizer, id)).collect();
    text.push_str(&decoder.finish());
    text
}

#[test]
fn byte_level_bpe_encodes_as_hugging_face() {
    let tokenizer = open("models/demo.gguf");
    for (text, ids) in cases("tests/fixtures/tokenizer/demo.json") {
        assert_eq!(tokenizer.encode(&text, true, true), ids, "{text:?}");
    }
}

#[test]
fn byte_level_bpe_is_reversible() {
    let tokenizer = open("models/demo.gguf");
    for (text, _) in cases("tests/fixtures/tokenizer/demo.json") {
        // What NFC changes, and only that, comes back changed.
        let expected =
            text.replace("e\u{301}", "é").replace("n\u{303}", "ñ").replace("\u{343}", "\u{313}");
        let ids = tokenizer.encode(&text, false, true);
        assert_eq!(tokenizer.decode(&ids), expected);
        assert_eq!(stream(&tokenizer, &ids), expected);
    }
}

#[test]
fn sentencepiece_encodes_as_the_original_and_back() {
    let tokenizer = open("tests/fixtures/tokenizer/llama-spm.gguf");
    for (text, ids) in cases("tests/fixtures/tokenizer/llama-spm.json") {
        assert_eq!(tokenizer.encode(&text, false, false), ids, "{text:?}");
        assert_eq!(tokenizer.decode(&ids), text);
        let space = if text.is_empty() { "" } else { " " };
        assert_eq!(stream(&tokenizer, &ids), format!("{space}{text}"), "the start is the caller's");
    }
}

#[test]
fn control_tokens_are_parsed_only_on_request_and_never_printed() {
    let tokenizer = open("models/demo.gguf");
    let ids = tokenizer.encode("<|im_start|>a<|im_end|>", true, true);
    assert_eq!(ids, [1, tokenizer.encode("a", false, true)[0], 2]);
    assert_eq!(tokenizer.decode(&ids), "a");
    for special in SPECIAL {
        let ids = tokenizer.encode(special, false, true);
        assert!(ids.len() > 1 && tokenizer.decode(&ids) == special);
    }
}

#[test]
fn sentencepiece_control_tokens_start_a_new_text() {
    let tokenizer = open("tests/fixtures/tokenizer/llama-spm.gguf");
    let a = tokenizer.encode("a", false, false);
    assert_eq!(tokenizer.encode("a</s>a", true, true), [&[1], &a[..], &[2], &a].concat());
    assert_eq!(tokenizer.encode("<s>a", true, true), [&[1], &a[..]].concat(), "one bos, not two");
    assert_eq!(tokenizer.encode("", true, true), [1]);
    assert!(!tokenizer.encode("</s>", false, false).contains(&2));
}

#[test]
fn the_demo_model_names_its_special_tokens() {
    let tokenizer = open("models/demo.gguf");
    assert_eq!([0, 1, 2, 3].map(|id| tokenizer.is_end(id)), [true, false, true, false]);
    assert_eq!(tokenizer.piece(1), b"");
    assert_eq!(tokenizer.piece(9999), b"", "there are 4096");
}

#[test]
fn sentencepiece_bytes_make_characters() {
    let tokenizer = open("tests/fixtures/tokenizer/llama-spm.gguf");
    let ids = tokenizer.encode("\u{1F642}", false, false);
    let bytes: Vec<u8> = ids.iter().flat_map(|&id| tokenizer.piece(id)).copied().collect();
    assert_eq!(bytes, " \u{1F642}".as_bytes());
    assert_eq!(tokenizer.decode(&ids[..ids.len() - 1]), "\u{FFFD}");
}

/// Time, not a result: long words and long runs of spaces must not take quadratic time.
#[test]
fn long_texts_end() {
    for model in ["models/demo.gguf", "tests/fixtures/tokenizer/llama-spm.gguf"] {
        let tokenizer = open(model);
        for text in ["ab".repeat(100_000), " ".repeat(100_000), "?!".repeat(100_000)] {
            let ids = tokenizer.encode(&text, true, false);
            assert!(tokenizer.decode(&ids) == text, "{model}");
        }
    }
}
