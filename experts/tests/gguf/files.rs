//! The repository's own model files, made by other programs, open with the sizes that those were told.

use std::path::{Path, PathBuf};

use outrigger_experts::{Arch, GgmlType, Model};

fn repository(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(path)
}

#[test]
fn the_demo_model() {
    let model = Model::open(&repository("models/demo.gguf")).unwrap();
    let spec = &model.spec;
    assert_eq!((spec.arch, spec.n_layers, spec.n_embd), (Arch::Qwen3Moe, 6, 256));
    assert_eq!((spec.n_experts, spec.n_used, spec.n_ff, spec.n_vocab), (32, 4, 128, 4096));
    let expert = model.experts[5].expert(31);
    assert_eq!(expert.gate_proj.ty(), GgmlType::Q8_0);
    assert_eq!(model.experts[5].bytes_per_expert(), 3 * 256 * 128 / 32 * 34);
    assert!(expert.down_proj.to_f32().iter().all(|x| x.is_finite() && x.abs() < 4.0));
    let tokens = model.gguf.meta().strings("tokenizer.ggml.tokens").unwrap().unwrap();
    assert_eq!(tokens.len(), spec.n_vocab);
}

#[test]
fn a_tiny_model_of_each_architecture() {
    for (dir, arch) in [
        ("mixtral", Arch::Llama),
        ("olmoe", Arch::Olmoe),
        ("qwen2moe", Arch::Qwen2Moe),
        ("qwen3moe", Arch::Qwen3Moe),
    ] {
        let path = repository(&format!("tests/fixtures/{dir}/model.gguf"));
        let model = Model::open(&path).unwrap_or_else(|error| panic!("{error}"));
        assert_eq!(model.spec.arch, arch);
        assert_eq!(model.layers.len(), model.spec.n_layers);
        assert_eq!(model.layers[0].shared.is_some(), arch == Arch::Qwen2Moe);
        assert_eq!(model.layers[0].q_bias.is_some(), arch == Arch::Qwen2Moe);
    }
}

#[test]
fn the_fuzzers_seeds() {
    for arch in ["llama", "olmoe", "qwen2moe", "qwen3moe"] {
        let model = Model::open(&repository(&format!("tests/fuzz/corpus/gguf/{arch}.gguf")));
        assert_eq!(model.unwrap().spec.arch.name(), arch);
    }
}
