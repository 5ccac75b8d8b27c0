//! `outrigger inspect`: what a model file holds, and what fits in which budget.

use std::path::PathBuf;

use anyhow::Result;
use clap::Args;
use outrigger::pack::Summary;
use outrigger::{Model, ModelSpec, Sizes};
use serde_json::json;

use super::view::{line, printable, put, size, table};

/// Show what a model file holds and what fits in which budget.
#[derive(Debug, Args)]
pub(crate) struct Inspect {
    /// Model file (GGUF), or the first of its shards
    #[arg(required_unless_present = "cpu")]
    file: Option<PathBuf>,
    /// Show which kernels this processor runs
    #[arg(long)]
    cpu: bool,
    /// Print a JSON object
    #[arg(long)]
    json: bool,
}

impl Inspect {
    pub(crate) fn run(self) -> Result<()> {
        let cpu = self.cpu.then(outrigger::cpu_features);
        let Some(path) = &self.file else {
            match self.json {
                true => line(json!({ "cpu": cpu }))?,
                false => line(cpu.unwrap_or_default())?,
            }
            return Ok(());
        };
        let model = Model::open(path)?;
        let sizes = Sizes::of(&model);
        let pack = Summary::of(&model)?;
        if self.json {
            let mut view = json_view(&model, &sizes);
            view["pack"] = pack.as_ref().map(pack_json).into();
            if let Some(cpu) = cpu {
                view["cpu"] = cpu.into();
            }
            line(view)?;
        } else {
            cpu.map_or(Ok(()), line)?;
            let more = match &pack {
                Some(pack) => pack_text(pack),
                None => budgets(&sizes, &model.spec),
            };
            put(&format!("{}\n{more}", text_view(&model, &sizes)))?;
        }
        Ok(())
    }
}

/// What a pack holds of each layer's experts, and what that cost.
fn pack_text(pack: &Summary) -> String {
    let titles = ["layer", "exact", "coded", "mean only", "bytes", "of full", "error"];
    let mut rows = vec![titles.map(String::from).to_vec()];
    for (at, layer) in pack.layers.iter().enumerate() {
        rows.push(vec![
            at.to_string(),
            layer.exact.to_string(),
            layer.coded.to_string(),
            layer.mean.to_string(),
            size(layer.bytes),
            format!("{:.1} %", 100.0 * layer.bytes as f64 / layer.full_bytes as f64),
            format!("{:.4}", layer.error),
        ]);
    }
    let types: Vec<_> = pack.matrices.iter().map(|(ty, n)| format!("{n} {ty}")).collect();
    format!(
        "a pack of {} of the experts, fitted to {}\nmatrices: {}\n\n{}\n\
         error: squared, of an expert's output on the calibration text, over the output's own square; weighted by use\n",
        printable(&pack.budget),
        printable(&pack.calibration),
        types.join(", "),
        table(&rows),
    )
}

fn pack_json(pack: &Summary) -> serde_json::Value {
    let layers = pack.layers.iter().map(|layer| {
        json!({
            "exact": layer.exact,
            "coded": layer.coded,
            "mean": layer.mean,
            "bytes": layer.bytes,
            "full_bytes": layer.full_bytes,
            "error": layer.error,
        })
    });
    let matrices = pack.matrices.iter().map(|(ty, n)| (ty.to_string(), json!(n)));
    json!({
        "budget": pack.budget,
        "calibration": pack.calibration,
        "layers": layers.collect::<Vec<_>>(),
        "matrices": matrices.collect::<serde_json::Map<_, _>>(),
    })
}

/// What each budget holds.
fn budgets(sizes: &Sizes, spec: &ModelSpec) -> String {
    let mut rows = vec![
        ["budget", "experts", "experts a layer", "memory with trunk"].map(String::from).to_vec(),
    ];
    for percent in [10, 25, 40, 50, 75, 100] {
        let bytes = sizes.experts * percent / 100;
        let a_layer = spec.n_experts as u64 * percent / 100;
        let enough = if a_layer < spec.n_used as u64 { " (less than a token needs)" } else { "" };
        rows.push(vec![
            format!("{percent} %"),
            size(bytes),
            format!("{a_layer} of {}{enough}", spec.n_experts),
            size(sizes.trunk + bytes),
        ]);
    }
    table(&rows)
}

fn text_view(model: &Model, sizes: &Sizes) -> String {
    let spec = &model.spec;
    let normalised = if spec.norm_weights { "normalised" } else { "not normalised" };
    let shared =
        spec.n_ff_shared.map_or(String::new(), |ff| format!(", shared expert of width {ff}"));
    let rows = [
        ("model", printable(&spec.name)),
        ("architecture", spec.arch.to_string()),
        ("fingerprint", model.gguf.fingerprint().to_string()),
        ("layers", spec.n_layers.to_string()),
        ("width", spec.n_embd.to_string()),
        (
            "attention",
            format!("{} heads, {} KV heads of {}", spec.n_heads, spec.n_kv_heads, spec.head_dim),
        ),
        (
            "experts",
            format!(
                "{} a layer of width {}, {} used{shared}",
                spec.n_experts, spec.n_ff, spec.n_used
            ),
        ),
        ("gate", format!("{:?}, {normalised}", spec.gating)),
        ("vocabulary", spec.n_vocab.to_string()),
        ("context", spec.context.to_string()),
        ("file", size(sizes.file)),
        ("trunk", size(sizes.trunk)),
        ("all experts", size(sizes.experts)),
        ("one expert", size(sizes.expert)),
        ("a token touches", size(sizes.token)),
    ];
    rows.iter().map(|(name, value)| format!("{name:<16}{value}\n")).collect()
}

fn json_view(model: &Model, sizes: &Sizes) -> serde_json::Value {
    let spec = &model.spec;
    json!({
        "name": spec.name,
        "architecture": spec.arch.to_string(),
        "fingerprint": model.gguf.fingerprint().to_string(),
        "layers": spec.n_layers,
        "width": spec.n_embd,
        "heads": spec.n_heads,
        "kv_heads": spec.n_kv_heads,
        "head_dim": spec.head_dim,
        "experts": spec.n_experts,
        "experts_used": spec.n_used,
        "expert_width": spec.n_ff,
        "shared_expert_width": spec.n_ff_shared,
        "normalised": spec.norm_weights,
        "vocabulary": spec.n_vocab,
        "context": spec.context,
        "file_bytes": sizes.file,
        "trunk_bytes": sizes.trunk,
        "experts_bytes": sizes.experts,
        "expert_bytes": sizes.expert,
        "weight_bytes_per_token": sizes.token,
    })
}
