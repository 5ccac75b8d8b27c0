//! A layer's routed experts: all of them in a full file; in a pack some exactly, the others approximated.

use super::layers::Loader;
use super::pack_names;
use super::spec::ModelSpec;
use crate::error::Result;
use crate::quant::ActFormat;
use crate::tensor::Tensor;
use crate::types::GgmlType;

/// The routed experts of one layer, as the model has them.
#[derive(Clone, Debug)]
pub struct ExpertLayer {
    stored: Stored,
    n_experts: usize,
    /// Of the gate, up and down projections.
    types: [GgmlType; 3],
    bytes_per_expert: usize,
}

/// How a file stores the experts of a layer.
#[derive(Clone, Debug)]
enum Stored {
    /// `[n_embd, n_ff, n_experts]` twice, and `[n_ff, n_embd, n_experts]`.
    Stacked { gate: Tensor, up: Tensor, down: Tensor },
    /// `[n_embd, 2 * n_ff, n_experts]`: an expert's gate rows, then its up rows.
    Fused { gate_up: Tensor, down: Tensor },
    /// Those that a pack has, by id.
    Single(Vec<Option<ExpertTensors>>),
}

/// One expert's matrices, each contiguous in the file.
#[derive(Clone, Debug)]
pub struct ExpertTensors {
    /// `[n_embd, n_ff]`.
    pub gate_proj: Tensor,
    /// `[n_embd, n_ff]`.
    pub up_proj: Tensor,
    /// `[n_ff, n_embd]`.
    pub down_proj: Tensor,
}

/// What a pack has of an expert that it does not have exactly.
#[derive(Clone, Debug)]
pub enum StandIn {
    /// Matrices of which some or all are coded.
    Copy(ExpertTensors),
    /// The mean output, `[n_embd]`.
    Mean(Tensor),
}

impl ExpertTensors {
    /// Gate, up and down projection.
    fn all(&self) -> [&Tensor; 3] {
        [&self.gate_proj, &self.up_proj, &self.down_proj]
    }
}

impl StandIn {
    /// Whether [`Tensor::check`] finds nothing wrong with any of its tensors.
    pub fn is_whole(&self) -> bool {
        self.tensors().all(|tensor| tensor.check().is_ok())
    }

    /// The bytes of all its tensors.
    pub fn byte_len(&self) -> usize {
        self.tensors().map(Tensor::byte_len).sum()
    }

    fn tensors(&self) -> impl Iterator<Item = &Tensor> {
        let tensors = match self {
            StandIn::Copy(tensors) => tensors.all().map(Some),
            StandIn::Mean(mean) => [Some(mean), None, None],
        };
        tensors.into_iter().flatten()
    }
}

impl ExpertLayer {
    /// How many there are in the model.
    pub fn n_experts(&self) -> usize {
        self.n_experts
    }

    /// Whether the file has this one exactly: a full file has all.
    pub fn holds(&self, e: usize) -> bool {
        match &self.stored {
            Stored::Single(experts) => experts.get(e).is_some_and(Option::is_some),
            _ => e < self.n_experts,
        }
    }

    /// The matrices of one.
    ///
    /// # Panics
    /// If the file has no expert `e`.
    pub fn expert(&self, e: usize) -> ExpertTensors {
        match &self.stored {
            Stored::Stacked { gate, up, down } => ExpertTensors {
                gate_proj: gate.expert(e),
                up_proj: up.expert(e),
                down_proj: down.expert(e),
            },
            Stored::Fused { gate_up, down } => {
                let both = gate_up.expert(e);
                let n_ff = both.rows() / 2;
                ExpertTensors {
                    gate_proj: both.rows_slice(0..n_ff),
                    up_proj: both.rows_slice(n_ff..2 * n_ff),
                    down_proj: down.expert(e),
                }
            }
            Stored::Single(experts) => {
                experts[e].clone().unwrap_or_else(|| panic!("the pack has no exact expert {e}"))
            }
        }
    }

    /// As [`Tensor::check`], of one expert of a pack. A full file has no checksums.
    pub(crate) fn check(&self, e: usize) -> Result<()> {
        let Stored::Single(experts) = &self.stored else { return Ok(()) };
        experts[e].iter().flat_map(ExpertTensors::all).try_for_each(Tensor::check)
    }

    /// The bytes of one, of all its matrices, in the full file.
    pub fn bytes_per_expert(&self) -> usize {
        self.bytes_per_expert
    }

    /// The bytes of all of them in the full file.
    pub fn full_bytes(&self) -> u64 {
        (self.bytes_per_expert * self.n_experts) as u64
    }

    /// The types of the gate, up and down projections in the full file.
    pub fn types(&self) -> [GgmlType; 3] {
        self.types
    }

    /// The form in which the experts read their input; plain floats where their two matrices differ.
    pub fn input_format(&self) -> ActFormat {
        let [gate, up, _] = self.types.map(GgmlType::act_format);
        if gate == up { gate } else { ActFormat::F32 }
    }

    /// The tensors that hold experts: two or three for all of the layer, or three for each that a pack has.
    pub fn tensors(&self) -> impl Iterator<Item = &Tensor> {
        let tensors = match &self.stored {
            Stored::Stacked { gate, up, down } => vec![gate, up, down],
            Stored::Fused { gate_up, down } => vec![gate_up, down],
            Stored::Single(experts) => {
                experts.iter().flatten().flat_map(ExpertTensors::all).collect()
            }
        };
        tensors.into_iter()
    }

    /// The contiguous parts of every expert that the file has exactly, with its id.
    pub(crate) fn parts(&self) -> Vec<(usize, Tensor)> {
        if let Stored::Single(experts) = &self.stored {
            let held = experts.iter().enumerate().filter_map(|(e, held)| Some((e, held.as_ref()?)));
            return held.flat_map(|(e, held)| held.all().map(|part| (e, part.clone()))).collect();
        }
        let parts = |stack: &Tensor| {
            let experts = 0..self.n_experts;
            experts.map(|e| (e, stack.expert(e))).collect::<Vec<_>>()
        };
        self.tensors().flat_map(parts).collect()
    }

    pub(super) fn load(loader: &mut Loader, spec: &ModelSpec, layer: usize) -> Result<ExpertLayer> {
        let &ModelSpec { n_embd, n_ff, n_experts, .. } = spec;
        let name = |part: &str| format!("blk.{layer}.{part}.weight");
        let fused = [n_embd, n_ff.saturating_mul(2), n_experts];
        let down =
            |loader: &mut Loader| loader.tensor(&name("ffn_down_exps"), &[n_ff, n_embd, n_experts]);
        let stored = match loader.optional(&name("ffn_gate_up_exps"), &fused)? {
            Some(gate_up) => Stored::Fused { gate_up, down: down(loader)? },
            None => Stored::Stacked {
                gate: loader.tensor(&name("ffn_gate_exps"), &[n_embd, n_ff, n_experts])?,
                up: loader.tensor(&name("ffn_up_exps"), &[n_embd, n_ff, n_experts])?,
                down: down(loader)?,
            },
        };
        let types = match &stored {
            Stored::Stacked { gate, up, down } => [gate.ty(), up.ty(), down.ty()],
            Stored::Fused { gate_up, down } => [gate_up.ty(), gate_up.ty(), down.ty()],
            Stored::Single(_) => unreachable!("only packs have single experts"),
        };
        Ok(ExpertLayer::new(stored, types, spec))
    }

    /// A pack's layer: what it has exactly, and what stands in for the others.
    pub(super) fn load_pack(
        loader: &mut Loader,
        spec: &ModelSpec,
        layer: usize,
    ) -> Result<(ExpertLayer, Vec<Option<StandIn>>)> {
        let types = read_types(loader, layer)?;
        let checksums = read_checksums(loader, spec)?;
        let (mut exact, mut standins) = (Vec::new(), Vec::new());
        for e in 0..spec.n_experts {
            let checksums = checksums.map(|all| all[layer * spec.n_experts + e]);
            let held = Held::load(loader, spec, layer, e, checksums)?;
            let (tensors, standin) = match held {
                Held::Exact(tensors) => (Some(tensors), None),
                Held::Approximate(standin) => (None, Some(standin)),
            };
            exact.push(tensors);
            standins.push(standin);
        }
        Ok((ExpertLayer::new(Stored::Single(exact), types, spec), standins))
    }

    fn new(stored: Stored, types: [GgmlType; 3], spec: &ModelSpec) -> ExpertLayer {
        let &ModelSpec { n_embd, n_ff, n_experts, .. } = spec;
        let matrices = [(n_embd, n_ff), (n_embd, n_ff), (n_ff, n_embd)];
        let bytes = |(ty, (cols, rows)): (GgmlType, (usize, usize))| {
            ty.row_bytes(cols).unwrap_or(0).saturating_mul(rows)
        };
        let bytes_per_expert = types.into_iter().zip(matrices).map(bytes).sum();
        ExpertLayer { stored, n_experts, types, bytes_per_expert }
    }
}

/// The types of a layer's experts in the full file, from the pack's metadata.
fn read_types(loader: &Loader, layer: usize) -> Result<[GgmlType; 3]> {
    let meta = loader.meta();
    let names = meta.strings(pack_names::TYPES)?.unwrap_or_default();
    let wrong =
        |found: String| meta.mismatch(pack_names::TYPES, found, "three weight types a layer");
    let Some(names) = names.as_chunks::<3>().0.get(layer) else {
        return Err(wrong(format!("{} types", names.len())));
    };
    let mut types = [GgmlType::F32; 3];
    for (ty, name) in types.iter_mut().zip(names) {
        *ty = name.parse().map_err(|_| wrong(format!("{name:?}")))?;
    }
    Ok(types)
}

/// Three an expert, if the pack has any.
fn read_checksums<'a>(loader: &Loader<'a>, spec: &ModelSpec) -> Result<Option<&'a [[u64; 3]]>> {
    let (meta, experts) = (loader.meta(), spec.n_layers * spec.n_experts);
    let Some(checksums) = meta.u64s(pack_names::CHECKSUMS)? else { return Ok(None) };
    match checksums.as_chunks::<3>() {
        (of_experts, []) if of_experts.len() == experts => Ok(Some(of_experts)),
        _ => {
            let found = format!("{} checksums", checksums.len());
            Err(meta.mismatch(pack_names::CHECKSUMS, found, "three an expert"))
        }
    }
}

/// One expert of a pack.
enum Held {
    Exact(ExpertTensors),
    Approximate(StandIn),
}

impl Held {
    fn load(
        loader: &mut Loader,
        spec: &ModelSpec,
        layer: usize,
        e: usize,
        checksums: Option<[u64; 3]>,
    ) -> Result<Held> {
        let seal = |tensor: Tensor, at: usize| match checksums {
            Some(checksums) => tensor.sealed(checksums[at]),
            None => tensor,
        };
        if let Some(mean) = loader.optional(&pack_names::mean(layer, e), &[spec.n_embd])? {
            return Ok(Held::Approximate(StandIn::Mean(seal(mean, 0))));
        }
        let mut matrix = |part: &str, dims: [usize; 2]| {
            let exact_name = pack_names::matrix(layer, part, e, GgmlType::F32);
            if let Some(exact) = loader.optional(&exact_name, &dims)? {
                return Ok(exact);
            }
            for ty in GgmlType::vqs() {
                let name = pack_names::matrix(layer, part, e, ty);
                if let Some(coded) = loader.codes(&name, ty, &dims)? {
                    return Ok(coded);
                }
            }
            let expected = "the pack to hold it, coded, or the expert's mean output";
            Err(loader.wrong(&exact_name, "no such tensor", expected))
        };
        let tensors = ExpertTensors {
            gate_proj: seal(matrix("ffn_gate", [spec.n_embd, spec.n_ff])?, 0),
            up_proj: seal(matrix("ffn_up", [spec.n_embd, spec.n_ff])?, 1),
            down_proj: seal(matrix("ffn_down", [spec.n_ff, spec.n_embd])?, 2),
        };
        let coded = |tensor: &Tensor| matches!(tensor.ty(), GgmlType::Vq(_));
        let exact = !tensors.all().into_iter().any(coded);
        Ok(match exact {
            true => Held::Exact(tensors),
            false => Held::Approximate(StandIn::Copy(tensors)),
        })
    }
}
