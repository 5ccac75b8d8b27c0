//! Whatever happens to the bytes of a valid file, opening it answers: with a model or with an error, never a panic.

use std::path::{Path, PathBuf};
use std::sync::LazyLock;

use crate::common::Small;
use outrigger_experts::Model;
use outrigger_experts::gguf::Header;
use proptest::prelude::*;

const ARCHITECTURES: [&str; 4] = ["olmoe", "qwen2moe", "qwen3moe", "llama"];

fn valid(arch: usize) -> Vec<u8> {
    static FILES: LazyLock<[Vec<u8>; 4]> = LazyLock::new(|| ARCHITECTURES.map(write));
    FILES[arch].clone()
}

fn write(arch: &'static str) -> Vec<u8> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("small.gguf");
    let mut small = Small::new(arch);
    let tokens: Vec<_> = (0..Small::N_VOCAB).map(|i| format!("token {i}")).collect();
    small.keys.insert("tokenizer.ggml.tokens".into(), tokens.into());
    small.write(&path);
    Model::open(&path).expect("a valid file");
    std::fs::read(&path).unwrap()
}

fn header_len(file: &[u8]) -> usize {
    let header = Header::parse(Path::new("small.gguf"), file).unwrap();
    header.tensors.iter().map(|tensor| tensor.range().start).min().unwrap()
}

#[test]
fn truncated_anywhere_in_the_header() {
    let file = valid(2);
    for len in 0..header_len(&file) {
        Header::parse(Path::new("small.gguf"), &file[..len]).expect_err("a part is refused");
    }
    // The data's end is missed too, up to the padding after the last tensor.
    let header = Header::parse(Path::new("small.gguf"), &file).unwrap();
    let end = header.tensors.iter().map(|tensor| tensor.range().end).max().unwrap();
    for len in header_len(&file)..end {
        Header::parse(Path::new("small.gguf"), &file[..len]).expect_err("a part is refused");
    }
    Header::parse(Path::new("small.gguf"), &file[..end]).unwrap();
}

/// Every byte of the header, set to some extremes.
#[test]
fn each_byte_replaced() {
    let file = valid(1);
    let mut broken = file.clone();
    for at in 0..header_len(&file) {
        for byte in [0, 1, 9, 0x7f, 0x80, 0xff, !file[at]] {
            broken[at] = byte;
            let _ = Header::parse(Path::new("small.gguf"), &broken);
        }
        broken[at] = file[at];
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(400) })]

    #[test]
    fn some_bytes_replaced(
        arch in 0..ARCHITECTURES.len(),
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
        in_header in any::<bool>(),
    ) {
        let mut file = valid(arch);
        let len = if in_header { header_len(&file) } else { file.len() };
        for (at, byte) in changes {
            file[at.index(len)] = byte;
        }
        open(&file)?;
    }

    #[test]
    fn a_part_moved_or_doubled(
        from in any::<prop::sample::Index>(),
        to in any::<prop::sample::Index>(),
        len in 1usize..200,
    ) {
        let mut file = valid(3);
        let header = header_len(&file);
        let from = from.index(header);
        let part = file[from..header.min(from + len)].to_vec();
        let to = to.index(header);
        file.splice(to..to, part);
        open(&file)?;
    }
}

/// Opens as a model; the experts of whatever opens can be taken and read.
fn open(file: &[u8]) -> Result<(), TestCaseError> {
    let dir = tempfile::tempdir().unwrap();
    let path: PathBuf = dir.path().join("mutated.gguf");
    std::fs::write(&path, file).unwrap();
    match Model::open(&path) {
        Ok(model) => {
            let experts = model
                .experts
                .iter()
                .flat_map(|layer| (0..layer.n_experts()).map(|e| layer.expert(e)));
            for expert in experts {
                prop_assert_eq!(
                    expert.down_proj.to_f32().len(),
                    model.spec.n_ff * model.spec.n_embd
                );
            }
        }
        Err(error) => prop_assert!(error.to_string().contains("mutated.gguf"), "{}", error),
    }
    Ok(())
}
