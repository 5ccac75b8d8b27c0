//! The files of this repository open.

use std::path::{Path, PathBuf};

use outrigger_experts::{Arch, Model};

fn repository(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(path)
}

#[test]
fn the_demo_model_opens() {
    let model = Model::open(&repository("models/demo.gguf")).unwrap();
    assert_eq!(model.spec.arch, Arch::Qwen3Moe);
    assert_eq!(model.layers.len(), model.spec.n_layers);
    assert_eq!(model.experts.len(), model.spec.n_layers);
    println!("{:#?}", model.spec);
}
