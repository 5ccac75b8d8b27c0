//! The part of a model that this server holds.

use std::fmt;
use std::ops::RangeInclusive;
use std::sync::Arc;

use outrigger_experts::{ActFormat, Fingerprint, Model};
use outrigger_proto::v1::{DescribeResponse, Encoding, Held, Limits};

use crate::{Error, Result, ServerConfig};

/// The part of a model that this server holds, and what it accepts.
pub(crate) struct Shard {
    pub(crate) model: Arc<Model>,
    pub(crate) fingerprint: Fingerprint,
    pub(crate) layers: RangeInclusive<u32>,
    pub(crate) experts: RangeInclusive<u32>,
    /// Encodings accepted for activations, best first.
    pub(crate) up: Vec<Encoding>,
    pub(crate) max_rows: u32,
}

/// Encodings offered for sums, best first.
pub(crate) const DOWN: [Encoding; 3] = [Encoding::F48, Encoding::F32, Encoding::F16];

/// A message's own bytes and those of each group, beside rows and weights: generous.
const MESSAGE_BYTES: usize = 1024;
const GROUP_BYTES: usize = 32;
/// A row's index and its weight in a group, at most.
const ENTRY_BYTES: usize = 5 + 4;

impl Shard {
    pub(crate) fn new(model: Arc<Model>, config: &ServerConfig) -> Result<Shard> {
        let (n_layers, n_experts) = (model.spec.n_layers as u32, model.spec.n_experts as u32);
        let layers = within("layers", &config.layers, n_layers)?;
        let experts = within("experts", &config.experts, n_experts)?;
        let up = up(&model, &layers);
        let fingerprint = model.gguf.fingerprint();
        Ok(Shard { model, fingerprint, layers, experts, up, max_rows: config.max_rows })
    }

    /// Values in a row of activations.
    pub(crate) fn width(&self) -> usize {
        self.model.spec.n_embd
    }

    /// Experts a layer of the model.
    pub(crate) fn n_experts(&self) -> u32 {
        self.model.spec.n_experts as u32
    }

    /// The largest request that can be valid: every row as f32, every expert on every row.
    pub(crate) fn max_message_bytes(&self) -> usize {
        let rows = self.max_rows as usize;
        let groups = self.n_experts() as usize * (GROUP_BYTES + rows * ENTRY_BYTES);
        MESSAGE_BYTES + rows * self.width() * size_of::<f32>() + groups
    }

    /// The largest answer: every row in the widest encoding, every expert not run.
    pub(crate) fn max_reply_bytes(&self) -> usize {
        let (rows, width) = (self.max_rows as usize, self.width());
        let sums = DOWN.iter().filter_map(|encoding| encoding.bytes(rows, width)).max();
        MESSAGE_BYTES + sums.unwrap_or(0) + self.n_experts() as usize * 5
    }

    pub(crate) fn describe(&self) -> DescribeResponse {
        DescribeResponse {
            fingerprint: self.fingerprint.as_bytes().to_vec().into(),
            model: self.model.spec.name.clone(),
            layers: self.model.spec.n_layers as u32,
            experts: self.n_experts(),
            width: self.width() as u32,
            held: vec![Held {
                first_layer: *self.layers.start(),
                last_layer: *self.layers.end(),
                first_expert: *self.experts.start(),
                last_expert: *self.experts.end(),
            }],
            up: self.up.iter().map(|&e| e as i32).collect(),
            down: DOWN.iter().map(|&e| e as i32).collect(),
            limits: Some(Limits {
                max_rows: self.max_rows,
                max_message_bytes: self.max_message_bytes() as u64,
            }),
            version: env!("CARGO_PKG_VERSION").to_owned(),
        }
    }
}

impl fmt::Display for Shard {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (layers, experts) = (&self.layers, &self.experts);
        let spec = &self.model.spec;
        write!(
            f,
            "{}, layers {}-{} of {}",
            spec.name,
            layers.start(),
            layers.end(),
            spec.n_layers
        )?;
        write!(f, ", experts {}-{} of {}", experts.start(), experts.end(), spec.n_experts)
    }
}

/// The range asked for, or all `count`.
fn within(
    what: &'static str,
    asked: &Option<RangeInclusive<u32>>,
    count: u32,
) -> Result<RangeInclusive<u32>> {
    let Some(asked) = asked else { return Ok(0..=count - 1) };
    let (first, last) = (*asked.start(), *asked.end());
    if first > last || last >= count {
        return Err(Error::Range { what, first, last, count });
    }
    Ok(asked.clone())
}

/// The blocks that the kernels of some layer make of activations anyway go first, since they lose nothing there.
fn up(model: &Model, layers: &RangeInclusive<u32>) -> Vec<Encoding> {
    let layers = &model.experts[*layers.start() as usize..=*layers.end() as usize];
    let blocks = [(ActFormat::Q8_0, Encoding::Q80), (ActFormat::Q8_K, Encoding::Q8K)];
    let made = blocks
        .into_iter()
        .filter(|(format, _)| layers.iter().any(|layer| layer.input_format() == *format));
    made.map(|(_, encoding)| encoding).chain([Encoding::F32, Encoding::F16]).collect()
}
