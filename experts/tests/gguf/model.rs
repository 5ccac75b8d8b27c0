//! A model's metadata and tensors are checked against each other, and the experts are where they should be.

use crate::common::Small;
use outrigger_experts::gguf::Value;
use outrigger_experts::{Gating, ModelSpec, QkNorm, RopeStyle, Tensor};

fn spec(small: &Small) -> ModelSpec {
    small.open().unwrap().spec
}

#[track_caller]
fn refused(small: &Small, words: &[&str]) {
    let text = small.refusal();
    for word in words {
        assert!(text.contains(word), "no {word:?} in: {text}");
    }
}

#[test]
fn each_architecture_has_its_rules() {
    type Row = (&'static str, RopeStyle, QkNorm, bool, Option<usize>);
    let rows: [Row; 4] = [
        ("olmoe", RopeStyle::Neox, QkNorm::Full, false, None),
        ("qwen2moe", RopeStyle::Neox, QkNorm::None, false, Some(10)),
        ("qwen3moe", RopeStyle::Neox, QkNorm::PerHead, true, None),
        ("llama", RopeStyle::Norm, QkNorm::None, true, None),
    ];
    for (arch, rope, qk_norm, norm_weights, n_ff_shared) in rows {
        let model = Small::new(arch).open().unwrap();
        let spec = &model.spec;
        assert_eq!(spec.arch.name(), arch);
        assert_eq!((spec.rope.style, spec.qk_norm), (rope, qk_norm), "{arch}");
        assert_eq!((spec.gating, spec.norm_weights), (Gating::Softmax, norm_weights), "{arch}");
        assert_eq!(spec.n_ff_shared, n_ff_shared, "{arch}");
        assert_eq!(model.layers[0].shared.is_some(), n_ff_shared.is_some());
        assert_eq!(model.layers[0].q_norm.is_some(), qk_norm != QkNorm::None);
        assert_eq!((spec.n_experts, spec.n_used, spec.n_ff), (4, 2, 6));
        assert_eq!((spec.n_heads, spec.n_kv_heads, spec.head_dim), (2, 1, 4));
        assert_eq!(spec.weights_scale, 1.0);
        assert_eq!((spec.rope.base, spec.rope.dim, spec.rope.scale), (10_000.0, 4, 1.0));
    }
}

#[test]
fn metadata_overrides_the_architecture() {
    let small =
        Small::new("olmoe").set("expert_weights_norm", true).set("expert_gating_func", 2u32);
    let small = small.set("expert_weights_scale", 2.5f32).set("rope.freq_base", 5e5f32);
    let small = small.set("expert_group_count", 1u32);
    let spec = spec(&small);
    assert_eq!((spec.norm_weights, spec.gating), (true, Gating::Sigmoid));
    assert_eq!((spec.weights_scale, spec.rope.base), (2.5, 5e5));
    let after = self::spec(&small.set("expert_gating_func", 3u32));
    assert_eq!(after.gating, Gating::SoftmaxAfterTopK);
    assert!(!self::spec(&Small::new("llama").set("expert_weights_norm", false)).norm_weights);
}

#[test]
fn what_is_not_supported_is_named() {
    let mut bert = Small::new("olmoe");
    bert.keys.insert("general.architecture".into(), "bert".into());
    let supported = "expected one of olmoe, qwen2moe, qwen3moe, llama";
    refused(&bert, &["key `general.architecture`", "\"bert\"", supported]);
    bert.keys.remove("general.architecture");
    refused(&bert, &["key `general.architecture`", "no such key"]);

    let dense = Small::new("llama").unset("expert_count");
    refused(&dense, &["key `llama.expert_count`", "no experts", "dense models are not supported"]);
    refused(&dense.set("expert_count", 0u32), &["no experts", "a mixture of experts"]);

    let olmoe = || Small::new("olmoe");
    refused(&olmoe().set("expert_gating_func", 4u32), &["`olmoe.expert_gating_func`", "found 4"]);
    refused(&olmoe().set("rope.scaling.type", "yarn"), &["`olmoe.rope.scaling.type`", "\"yarn\""]);
    refused(&olmoe().set("attention.clamp_kqv", 8f32), &["attention.clamp_kqv`", "not supported"]);
    let groups = olmoe().set("expert_group_count", 2u32);
    refused(&groups, &["`olmoe.expert_group_count`", "found 2", "by groups is not supported"]);
    let bias = Small { tensors: olmoe().tensors, ..olmoe() }.tensor("blk.0.exp_probs_b", &[4]);
    refused(&bias, &["tensor `blk.0.exp_probs_b.weight`", "this architecture does not use"]);
}

#[test]
fn rope_scaling_is_linear_or_none() {
    let scale = |keys: &[(&str, Value)]| {
        let small = keys.iter().fold(Small::new("llama"), |s, (k, v)| s.set(k, v.clone()));
        spec(&small).rope.scale
    };
    let (ty, factor) = ("rope.scaling.type", "rope.scaling.factor");
    assert_eq!(scale(&[(ty, "linear".into()), (factor, 4f32.into())]), 4.0);
    assert_eq!(scale(&[(ty, "none".into()), (factor, 4f32.into())]), 1.0);
    assert_eq!(scale(&[(factor, 4f32.into())]), 4.0);
    assert_eq!(scale(&[("rope.scale_linear", 2f32.into())]), 2.0);
    assert_eq!(scale(&[(factor, 0f32.into())]), 1.0);
    refused(&Small::new("llama").set(factor, -1f32), &["scaling.factor`", "found -1"]);
}

#[test]
fn metadata_that_contradicts_itself() {
    let olmoe = || Small::new("olmoe");
    refused(
        &olmoe().set("expert_used_count", 5u32),
        &["key `olmoe.expert_used_count`", "found 5", "at most the 4 experts"],
    );
    refused(&olmoe().set("expert_used_count", 0u32), &["expert_used_count`", "found 0"]);
    refused(&olmoe().set("expert_count", 70_000u32), &["expert_count`", "at most 65535"]);
    refused(&olmoe().set("attention.head_count_kv", 3u32), &["a divisor of the 2 heads"]);
    refused(
        &olmoe().set("attention.head_count", 3u32).unset("attention.head_count_kv"),
        &["of the width 8"],
    );
    refused(&olmoe().set("attention.head_count", 0u32), &["head_count`", "found 0", "positive"]);
    refused(&olmoe().set("attention.value_length", 8u32), &["value_length`", "4, as the keys"]);
    refused(&olmoe().set("rope.dimension_count", 6u32), &["dimension_count`", "up to the head's"]);
    refused(&olmoe().set("rope.dimension_count", 3u32), &["dimension_count`", "an even number"]);
    refused(&olmoe().set("rope.freq_base", f32::NAN), &["rope.freq_base`", "found NaN"]);
    refused(&olmoe().set("attention.layer_norm_rms_epsilon", 0f32), &["epsilon`", "found 0"]);
    refused(&olmoe().unset("block_count"), &["key `olmoe.block_count`", "no such key"]);
    refused(&olmoe().set("block_count", u32::MAX), &["tensor `blk.1.", "no such tensor"]);
    refused(&olmoe().set("embedding_length", 16u32), &["tensor `token_embd.weight`"]);
    refused(
        &olmoe().set("embedding_length", u32::MAX - 3),
        &["embedding_length`", "found 4294967292", "at most 512 for each of the 2 heads"],
    );
    refused(
        &olmoe().set("attention.key_length", 513u32),
        &["key_length`", "found 513", "at most 512"],
    );
    refused(&olmoe().set("feed_forward_length", vec![6u32]), &["an integer", "array of 1 u32"]);
    let qwen = Small::new("qwen3moe").unset("expert_feed_forward_length");
    assert_eq!(spec(&qwen.clone().set("feed_forward_length", 12u32)).n_ff, 6);
    refused(&qwen.set("feed_forward_length", 13u32), &["a multiple of the 2 experts used"]);
    let mut vocab = olmoe();
    vocab.keys.insert("tokenizer.ggml.tokens".into(), vec!["a".to_owned()].into());
    refused(&vocab, &["key `tokenizer.ggml.tokens`", "1 tokens", "expected 16"]);
}

/// Every tensor of every architecture, with each of its dimensions wrong, or not there.
#[test]
fn tensors_that_contradict_metadata() {
    for arch in ["olmoe", "qwen2moe", "qwen3moe", "llama"] {
        let small = Small::new(arch);
        for (name, dims) in &small.tensors {
            let place = format!("tensor `{name}`");
            let short = name.strip_suffix(".weight").unwrap();
            for axis in 0..dims.len() {
                let mut wrong = dims.clone();
                wrong[axis] += 1;
                // A vocabulary of another size is a model of another size, whose other half contradicts.
                if (name.as_str(), axis) == ("token_embd.weight", 1) {
                    refused(&small.clone().tensor(short, &wrong), &["tensor `output.weight`"]);
                    continue;
                }
                let (found, expected) =
                    (format!("dimensions {wrong:?}"), format!("expected {dims:?}"));
                refused(&small.clone().tensor(short, &wrong), &[&place, &found, &expected]);
            }
            if name != "output.weight" {
                refused(&small.clone().without(short), &[&place, "no such tensor"]);
            }
        }
    }
}

#[test]
fn a_tied_output_is_the_embeddings() {
    let model = Small::new("qwen3moe").without("output").open().unwrap();
    assert_eq!(model.output.name(), "token_embd.weight");
    assert_eq!(model.output.dims(), [8, 16]);
}

fn values(tensor: &Tensor) -> Vec<usize> {
    tensor.to_f32().into_iter().map(|x| x as usize).collect()
}

/// The values count up along the file: an expert's are those of the slowest dimension's slice.
#[test]
fn experts_are_slices() {
    let model = Small::new("olmoe").open().unwrap();
    let layer = &model.experts[0];
    assert_eq!(layer.n_experts(), 4);
    assert_eq!(layer.bytes_per_expert(), 3 * 48 * 4);
    for e in 0..4 {
        let expert = layer.expert(e);
        assert_eq!(expert.gate_proj.dims(), [8, 6]);
        assert_eq!(expert.down_proj.dims(), [6, 8]);
        for tensor in [&expert.gate_proj, &expert.up_proj, &expert.down_proj] {
            assert!(values(tensor).into_iter().eq(48 * e..48 * (e + 1)), "{}", tensor.name());
        }
        let row = expert.up_proj.rows_slice(2..3);
        assert!(values(&row).into_iter().eq(48 * e + 16..48 * e + 24));
        assert_eq!((row.mat().rows, row.mat().cols), (1, 8));
    }
}

#[test]
fn fused_experts_have_their_gate_rows_first() {
    let small = Small::new("olmoe").without("blk.0.ffn_gate_exps").without("blk.0.ffn_up_exps");
    let model = small.tensor("blk.0.ffn_gate_up_exps", &[8, 12, 4]).open().unwrap();
    let layer = &model.experts[0];
    assert_eq!(layer.bytes_per_expert(), 3 * 48 * 4);
    assert_eq!(layer.tensors().count(), 2);
    for e in 0..4 {
        let expert = layer.expert(e);
        assert!(values(&expert.gate_proj).into_iter().eq(96 * e..96 * e + 48));
        assert!(values(&expert.up_proj).into_iter().eq(96 * e + 48..96 * (e + 1)));
    }
}

/// One expert and one row: writers may drop the dimension.
#[test]
fn trailing_ones_may_be_absent() {
    let small = Small::new("qwen2moe").set("expert_count", 1u32).set("expert_used_count", 1u32);
    let small = ["gate", "up"]
        .iter()
        .fold(small, |small, part| small.tensor(&format!("blk.0.ffn_{part}_exps"), &[8, 6]));
    let small = small.tensor("blk.0.ffn_down_exps", &[6, 8, 1]).tensor("blk.0.ffn_gate_inp", &[8]);
    let model = small.tensor("blk.0.ffn_gate_inp_shexp", &[8, 1]).open().unwrap();
    assert_eq!(model.experts[0].expert(0).up_proj.dims(), [8, 6]);
    assert_eq!(model.layers[0].router.dims(), [8, 1]);
    assert_eq!(model.layers[0].shared.as_ref().unwrap().gate_inp.dims(), [8]);
}
