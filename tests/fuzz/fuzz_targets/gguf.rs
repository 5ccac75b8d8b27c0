//! Any bytes are a model's header or an error: never a panic, nothing allocated on a claim.
//!
//! The seeds in `corpus/gguf` are one-layer models, as the tests' `Small` writes them.
#![no_main]

use std::path::Path;

use libfuzzer_sys::fuzz_target;
use outrigger_experts::ModelSpec;
use outrigger_experts::gguf::Header;

fuzz_target!(|file: &[u8]| {
    let Ok(header) = Header::parse(Path::new("fuzz.gguf"), file) else { return };
    for tensor in &header.tensors {
        let bytes = &file[tensor.range()];
        let rows = tensor.dims()[1..].iter().product::<usize>();
        let row = tensor.ty().and_then(|ty| ty.row_bytes(tensor.dims()[0]));
        assert!(row.is_none_or(|row| row * rows == bytes.len()));
    }
    let embeddings = header.tensors.iter().find(|tensor| tensor.name() == "token_embd.weight");
    let n_vocab = embeddings.map_or(0, |tensor| tensor.dims()[1..].iter().product());
    if let Ok(spec) = ModelSpec::from_metadata(&header.meta, n_vocab) {
        assert!(
            spec.n_used <= spec.n_experts && spec.head_dim > 0 && spec.rope.dim <= spec.head_dim
        );
    }
});
