//! Any model file's vocabulary is a tokenizer or an error, and any text is tokens of it and text again.
//!
//! What follows the last 0xff byte is the text, what is before it the file.
#![no_main]

use std::path::Path;

use libfuzzer_sys::fuzz_target;
use outrigger::text::{StreamDecoder, Tokenizer};
use outrigger_experts::gguf::Header;

fuzz_target!(|data: &[u8]| {
    let end = data.iter().rposition(|byte| *byte == 0xff).unwrap_or(data.len());
    let text = String::from_utf8_lossy(data.get(end + 1..).unwrap_or_default());
    let Ok(header) = Header::parse(Path::new("fuzz.gguf"), &data[..end]) else { return };
    let Ok(tokenizer) = Tokenizer::from_gguf(&header.meta) else { return };
    let tokens = header.meta.strings("tokenizer.ggml.tokens").ok().flatten().map_or(0, <[_]>::len);
    for (parse_special, add_bos) in [(false, false), (true, true)] {
        let ids = tokenizer.encode(&text, parse_special, add_bos);
        assert!(ids.iter().all(|id| (*id as usize) < tokens));
        let whole = tokenizer.decode(&ids);
        let mut decoder = StreamDecoder::new();
        let mut parts: String = ids.iter().map(|id| decoder.push(&tokenizer, *id)).collect();
        parts.push_str(&decoder.finish());
        assert!(parts.ends_with(&whole), "{parts:?} {whole:?}");
    }
});
