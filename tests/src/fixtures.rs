//! Files that independent programs made; `tests/fixtures/README.md` says how.

use std::path::{Path, PathBuf};

use half::f16;
use outrigger_experts::gguf::{Gguf, Layout, Writer};
use outrigger_experts::{GgmlType, quantize};

/// A path below the repository's root.
pub fn repository(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(path)
}

/// The demo model.
pub fn demo_model() -> PathBuf {
    repository("models/demo.gguf")
}

/// The tiny model of an architecture.
pub fn tiny_model(architecture: &str) -> PathBuf {
    repository("tests/fixtures").join(architecture).join("model.gguf")
}

/// Writes a model of the shape of [`tiny_model`]`("olmoe")`, half of whose weights have the other sign.
pub fn other_model(directory: &Path) -> PathBuf {
    let path = directory.join("other.gguf");
    let mut bytes = std::fs::read(tiny_model("olmoe")).expect("the fixture is there");
    let weights = bytes.len() - 600_000;
    bytes[weights..].chunks_exact_mut(8).for_each(|pair| pair[3] ^= 0x80);
    std::fs::write(&path, bytes).expect("a temporary directory");
    path
}

/// Writes the demo model with other weight types, where `ty` says one for a tensor's name, and, where `every_expert`, with all of its
/// experts in use for each token: then none are nearly tied, so that rounding moves logits a little rather than swap an expert.
pub fn rewrite(path: &Path, every_expert: bool, ty: impl Fn(&str) -> Option<GgmlType>) {
    let model = Gguf::open(&demo_model()).expect("it opens");
    let mut layout = Layout::new(path);
    for (key, value) in model.meta().iter() {
        layout.set(key, value.clone());
    }
    if every_expert {
        let count = model.meta().get("qwen3moe.expert_count").expect("a number of experts");
        layout.set("qwen3moe.expert_used_count", count.clone());
    }
    for tensor in model.tensors() {
        let ty = ty(tensor.name()).or(tensor.ty()).expect("a known type");
        layout.tensor(tensor.name(), ty, tensor.dims()).expect("it fits");
    }
    let mut writer = Writer::create(layout).expect("it can be written");
    for info in model.tensors() {
        let tensor = model.tensor(info.name()).expect("it is there");
        let mut bytes = Vec::new();
        match ty(info.name()).filter(|ty| *ty != tensor.ty()) {
            Some(ty) => quantize(ty, &tensor.to_f32(), &mut bytes),
            None => bytes.extend_from_slice(tensor.bytes()),
        }
        writer.write(&bytes).expect("room");
    }
    writer.finish().expect("it is whole");
}

/// A fixture's token ids.
pub fn tokens(fixture: &str) -> Vec<u32> {
    let path = repository("tests/fixtures").join(fixture).join("tokens.json");
    let text = std::fs::read_to_string(&path).expect("the fixture is there");
    serde_json::from_str(&text).expect("a list of ids")
}

/// A fixture's little-endian f32 values.
pub fn f32s(file: &str) -> Vec<f32> {
    let bytes =
        std::fs::read(repository("tests/fixtures").join(file)).expect("the fixture is there");
    bytes.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect()
}

/// A fixture's little-endian f16 values.
pub fn f16s(file: &str) -> Vec<f32> {
    let bytes =
        std::fs::read(repository("tests/fixtures").join(file)).expect("the fixture is there");
    bytes.as_chunks::<2>().0.iter().map(|b| f16::from_le_bytes(*b).to_f32()).collect()
}
