//! The fingerprint is the model's: the same however the file is arranged, another for every other model.

use crate::common::{Raw, Small, u32_value};
use outrigger_experts::{Fingerprint, Gguf};

fn of(small: &Small) -> Fingerprint {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("small.gguf");
    small.write(&path);
    Gguf::open(&path).unwrap().fingerprint()
}

fn of_raw(raw: &Raw, change: impl FnOnce(&mut [u8])) -> Fingerprint {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("raw.gguf");
    let mut bytes = raw.bytes();
    let data = bytes.len() - raw.data.len();
    change(&mut bytes[data..]);
    std::fs::write(&path, bytes).unwrap();
    Gguf::open(&path).unwrap().fingerprint()
}

#[test]
fn arrangement_does_not_matter() {
    let (a, b) = (("a", u32_value(1)), ("b", u32_value(2)));
    let big = 1 << 20;
    let one = Raw::new().key(a.0, a.1.clone()).key(b.0, b.1.clone());
    let one = one.tensor("v", &[8], 0, 0).tensor("w", &[big / 4], 0, 32).data(32 + big as usize);
    let two = Raw::new().key(b.0, b.1).key(a.0, a.1);
    let two = two.tensor("w", &[big / 4], 0, 0).tensor("v", &[8], 0, big).data(big as usize + 32);
    assert_eq!(of_raw(&one, |_| {}), of_raw(&two, |_| {}));
    // Every byte of a small tensor counts, and of a large one those at its ends.
    let end = 32 + big as usize;
    let changed: Vec<_> = [0, 31, 32, 32 + 4095, end - 1]
        .into_iter()
        .map(|at| of_raw(&one, |data| data[at] = 1))
        .chain([of_raw(&one, |_| {})])
        .collect();
    for (i, fingerprint) in changed.iter().enumerate() {
        assert!(!changed[..i].contains(fingerprint), "change {i} is not seen");
    }
}

#[test]
fn metadata_and_directory_matter() {
    let small = Small::new("llama");
    let all = [
        of(&small),
        of(&small.clone().set("attention.layer_norm_rms_epsilon", 2e-5f32)),
        of(&small.clone().set("attention.layer_norm_rms_epsilon", 1e-5f64)),
        of(&small.clone().tensor("output", &[16, 8])),
        of(&small.clone().tensor("output", &[128])),
        of(&small.clone().without("output").tensor("outpux", &[8, 16])),
        of(&small.without("output")),
    ];
    for (i, fingerprint) in all.iter().enumerate() {
        assert!(!all[..i].contains(fingerprint), "change {i} is not seen");
    }
}

#[test]
fn a_file_made_of_a_full_model_carries_its_fingerprint() {
    let full = Fingerprint([0xab; 32]);
    let mut small = Small::new("llama");
    small.keys.insert("outrigger.fingerprint".into(), full.to_string().into());
    assert_eq!(of(&small), full);
    assert_eq!(Fingerprint::try_from(&full.as_bytes()[..]).unwrap(), full);
    assert!(Fingerprint::try_from(&[1u8, 2][..]).is_err());
    small.keys.insert("outrigger.fingerprint".into(), "abc".into());
    let text = small.refusal();
    assert!(text.contains("key `outrigger.fingerprint`: found \"abc\", expected 64 hex"), "{text}");
}
