//! Files for tests: hostile ones byte by byte, and a small model that can be changed before it is written.

use std::collections::BTreeMap;
use std::path::Path;

use outrigger_experts::gguf::{Layout, Value, Writer};
use outrigger_experts::{GgmlType, Model, Result};

/// A file spelled out: what the format's document says, written down again without the crate's help.
#[derive(Clone)]
pub(crate) struct Raw {
    pub(crate) magic: [u8; 4],
    pub(crate) version: u32,
    pub(crate) n_tensors: Option<u64>,
    pub(crate) n_keys: Option<u64>,
    /// Each a whole key with its value.
    pub(crate) keys: Vec<Vec<u8>>,
    /// Each a whole directory entry.
    pub(crate) entries: Vec<Vec<u8>>,
    pub(crate) data: Vec<u8>,
    pub(crate) alignment: usize,
}

impl Raw {
    pub(crate) fn new() -> Raw {
        Raw {
            magic: *b"GGUF",
            version: 3,
            n_tensors: None,
            n_keys: None,
            keys: vec![],
            entries: vec![],
            data: vec![],
            alignment: 32,
        }
    }

    /// Adds a key; `value` has the type's id and the bytes.
    pub(crate) fn key(mut self, key: &str, value: (u32, Vec<u8>)) -> Raw {
        self.keys.push([string(key.as_bytes()), value.0.to_le_bytes().to_vec(), value.1].concat());
        self
    }

    pub(crate) fn tensor(mut self, name: &str, dims: &[u64], ty: u32, offset: u64) -> Raw {
        let dims_bytes: Vec<u8> = dims.iter().flat_map(|dim| dim.to_le_bytes()).collect();
        self.entries.push(
            [
                string(name.as_bytes()),
                (dims.len() as u32).to_le_bytes().to_vec(),
                dims_bytes,
                ty.to_le_bytes().to_vec(),
                offset.to_le_bytes().to_vec(),
            ]
            .concat(),
        );
        self
    }

    pub(crate) fn data(mut self, len: usize) -> Raw {
        self.data = vec![0; len];
        self
    }

    pub(crate) fn bytes(&self) -> Vec<u8> {
        let mut out = self.magic.to_vec();
        out.extend(self.version.to_le_bytes());
        out.extend(self.n_tensors.unwrap_or(self.entries.len() as u64).to_le_bytes());
        out.extend(self.n_keys.unwrap_or(self.keys.len() as u64).to_le_bytes());
        self.keys.iter().chain(&self.entries).for_each(|part| out.extend(part));
        out.resize(out.len().div_ceil(self.alignment) * self.alignment, 0);
        out.extend(&self.data);
        out
    }
}

pub(crate) fn string(s: &[u8]) -> Vec<u8> {
    [&(s.len() as u64).to_le_bytes(), s].concat()
}

pub(crate) fn u32_value(n: u32) -> (u32, Vec<u8>) {
    (4, n.to_le_bytes().to_vec())
}

/// An array's value: the elements' type, how many it says there are, and their bytes.
pub(crate) fn array_value(ty: u32, len: u64, elements: &[u8]) -> (u32, Vec<u8>) {
    (9, [&ty.to_le_bytes()[..], &len.to_le_bytes(), elements].concat())
}

/// A model of one layer in F32, small enough to be written out: keys and tensors can be changed first. Tensor values
/// count up from 0 in each tensor.
#[derive(Clone)]
pub(crate) struct Small {
    pub(crate) arch: &'static str,
    pub(crate) keys: BTreeMap<String, Value>,
    pub(crate) tensors: BTreeMap<String, Vec<usize>>,
}

impl Small {
    pub(crate) const N_EMBD: usize = 8;
    pub(crate) const N_FF: usize = 6;
    pub(crate) const N_EXPERTS: usize = 4;
    pub(crate) const N_VOCAB: usize = 16;

    /// Two heads of width 4, one of keys and values, two experts of four.
    pub(crate) fn new(arch: &'static str) -> Small {
        let mut small = Small { arch, keys: BTreeMap::new(), tensors: BTreeMap::new() };
        small.keys.insert("general.architecture".into(), arch.into());
        let (n_embd, n_ff, n_experts) = (Small::N_EMBD, Small::N_FF, Small::N_EXPERTS);
        for (key, value) in [
            ("block_count", 1),
            ("context_length", 128),
            ("embedding_length", n_embd),
            ("feed_forward_length", n_ff),
            ("expert_feed_forward_length", n_ff),
            ("expert_shared_feed_forward_length", 10),
            ("attention.head_count", 2),
            ("attention.head_count_kv", 1),
            ("expert_count", n_experts),
            ("expert_used_count", 2),
        ] {
            small = small.set(key, value as u32);
        }
        small = small.set("attention.layer_norm_rms_epsilon", 1e-5f32);
        for (name, dims) in [
            ("token_embd", vec![n_embd, Small::N_VOCAB]),
            ("output", vec![n_embd, Small::N_VOCAB]),
            ("output_norm", vec![n_embd]),
            ("blk.0.attn_norm", vec![n_embd]),
            ("blk.0.attn_q", vec![n_embd, 8]),
            ("blk.0.attn_k", vec![n_embd, 4]),
            ("blk.0.attn_v", vec![n_embd, 4]),
            ("blk.0.attn_output", vec![8, n_embd]),
            ("blk.0.ffn_norm", vec![n_embd]),
            ("blk.0.ffn_gate_inp", vec![n_embd, n_experts]),
            ("blk.0.ffn_gate_exps", vec![n_embd, n_ff, n_experts]),
            ("blk.0.ffn_up_exps", vec![n_embd, n_ff, n_experts]),
            ("blk.0.ffn_down_exps", vec![n_ff, n_embd, n_experts]),
        ] {
            small = small.tensor(name, &dims);
        }
        let more: &[(&str, &[usize])] = match arch {
            "olmoe" => &[("blk.0.attn_q_norm", &[8]), ("blk.0.attn_k_norm", &[4])],
            "qwen3moe" => &[("blk.0.attn_q_norm", &[4]), ("blk.0.attn_k_norm", &[4])],
            "qwen2moe" => &[
                ("blk.0.ffn_gate_shexp", &[8, 10]),
                ("blk.0.ffn_up_shexp", &[8, 10]),
                ("blk.0.ffn_down_shexp", &[10, 8]),
                ("blk.0.ffn_gate_inp_shexp", &[8]),
            ],
            _ => &[],
        };
        more.iter().fold(small, |small, (name, dims)| small.tensor(name, dims))
    }

    /// Sets a key under the architecture's prefix.
    pub(crate) fn set(mut self, key: &str, value: impl Into<Value>) -> Small {
        self.keys.insert(format!("{}.{key}", self.arch), value.into());
        self
    }

    pub(crate) fn unset(mut self, key: &str) -> Small {
        self.keys.remove(&format!("{}.{key}", self.arch)).expect("a key that is set");
        self
    }

    pub(crate) fn tensor(mut self, name: &str, dims: &[usize]) -> Small {
        self.tensors.insert(format!("{name}.weight"), dims.to_vec());
        self
    }

    pub(crate) fn without(mut self, name: &str) -> Small {
        self.tensors.remove(&format!("{name}.weight")).expect("a tensor that is there");
        self
    }

    pub(crate) fn write(&self, path: &Path) {
        let mut layout = Layout::new(path);
        self.keys.iter().for_each(|(key, value)| layout.set(key, value.clone()));
        self.write_tensors(layout, |_| true);
    }

    /// Writes the tensors that `wanted` picks.
    pub(crate) fn write_tensors(&self, mut layout: Layout, wanted: impl Fn(&str) -> bool) {
        let tensors: Vec<_> = self.tensors.iter().filter(|(name, _)| wanted(name)).collect();
        for (name, dims) in &tensors {
            layout.tensor(name, GgmlType::F32, dims).unwrap();
        }
        let mut writer = Writer::create(layout).unwrap();
        for (_, dims) in tensors {
            let values = (0..dims.iter().product()).map(|i: usize| i as f32);
            writer.write(&values.flat_map(f32::to_le_bytes).collect::<Vec<u8>>()).unwrap();
        }
        writer.finish().unwrap();
    }

    /// Writes and opens.
    pub(crate) fn open(&self) -> Result<Model> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("small.gguf");
        self.write(&path);
        Model::open(&path)
    }

    /// The message with which the model is refused; it names the file.
    pub(crate) fn refusal(&self) -> String {
        let message = self.open().expect_err("a refusal").to_string();
        assert!(message.contains("small.gguf: "), "{message}");
        message
    }
}
