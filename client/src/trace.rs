//! Routing traces: what the gate chose, batch by batch and layer by layer, to be replayed without the model.
//!
//! All integers are little-endian. A file starts with `ORTRACE` and the format's version in a byte, then layers, experts
//! a layer and experts a row as u16, then the bytes of one expert of each layer as u64. A record is one batch of rows in
//! one layer: the layer as u16, the rows as u32, then ids `[rows, k]`, a byte each where a layer has at most 256 experts
//! and two where it has more, then weights `[rows, k]` as f16. Records are in the order in which the engine ran them.

use std::fs::File;
use std::io::{BufWriter, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use half::f16;
use outrigger_experts::Model;
use outrigger_router::Routing;

use crate::error::{Error, Result};

/// The format's version is the last byte.
const MAGIC: &[u8; 8] = b"ORTRACE\x01";

/// What the gate chose, in the order in which it did.
#[derive(Clone, Debug, PartialEq)]
pub struct Trace {
    /// The model's dimensions.
    pub shape: Shape,
    /// One a batch of rows and layer.
    pub batches: Vec<Batch>,
    /// Whether the file ended within a batch, which is left out.
    pub cut_off: bool,
}

/// What a trace says of its model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shape {
    /// Experts a layer.
    pub n_experts: usize,
    /// Experts a row.
    pub k: usize,
    /// Bytes of one expert, by layer.
    pub expert_bytes: Vec<u64>,
}

/// One batch of rows in one layer.
#[derive(Clone, Debug, PartialEq)]
pub struct Batch {
    /// The layer.
    pub layer: usize,
    /// `[rows, k]`, what the gate chose, best first.
    pub experts: Vec<u16>,
    /// `[rows, k]`, the weights of `experts`, rounded to f16.
    pub weights: Vec<f32>,
}

impl Trace {
    /// Reads a trace up to its last whole batch.
    ///
    /// # Errors
    /// [`Error::Io`] if the file cannot be read, [`Error::Trace`] if it is no trace.
    pub fn open(path: impl AsRef<Path>) -> Result<Trace> {
        let path = path.as_ref();
        let bytes =
            std::fs::read(path).map_err(|source| Error::Io { path: path.to_owned(), source })?;
        let refuse = |(found, expected)| Error::Trace { path: path.to_owned(), found, expected };
        let mut rest = &bytes[..];
        let shape = read_shape(&mut rest).map_err(refuse)?;
        let mut batches = Vec::new();
        while let Some(batch) = read_batch(&mut rest, &shape) {
            let number = batches.len();
            check_batch(&batch, number, &shape).map_err(refuse)?;
            batches.push(batch);
        }
        Ok(Trace { shape, batches, cut_off: !rest.is_empty() })
    }
}

/// What was found, and what was expected.
type Refusal = (String, String);

fn read_shape(rest: &mut &[u8]) -> Result<Shape, Refusal> {
    let no_trace = || {
        let expected = "a routing trace of version 1, as --trace writes it";
        ("no or another header".to_owned(), expected.to_owned())
    };
    if take(rest, MAGIC.len()) != Some(MAGIC) {
        return Err(no_trace());
    }
    let mut number = || take(rest, 2).map(|b| usize::from(u16::from_le_bytes([b[0], b[1]])));
    let [layers, n_experts, k] = [number(), number(), number()].map(Option::unwrap_or_default);
    let sizes = take(rest, 8 * layers).ok_or_else(no_trace)?;
    let expert_bytes: Vec<u64> =
        sizes.as_chunks().0.iter().map(|bytes| u64::from_le_bytes(*bytes)).collect();
    let total = expert_bytes
        .iter()
        .try_fold(0u64, |total, &bytes| total.checked_add(bytes.checked_mul(n_experts as u64)?));
    if layers == 0 || !(1..=n_experts).contains(&k) || total.is_none_or(|total| total == 0) {
        let found =
            format!("{layers} layers, {n_experts} experts, {k} a row, bytes {expert_bytes:?}");
        return Err((found, "a model's dimensions".to_owned()));
    }
    Ok(Shape { n_experts, k, expert_bytes })
}

/// The next batch, if all of it is there; otherwise `rest` stays as it is.
fn read_batch(rest: &mut &[u8], shape: &Shape) -> Option<Batch> {
    let mut at = *rest;
    let layer = u16::from_le_bytes(take(&mut at, 2)?.try_into().ok()?);
    let rows = u32::from_le_bytes(take(&mut at, 4)?.try_into().ok()?);
    let calls = rows as usize * shape.k;
    let experts = match is_narrow(shape.n_experts) {
        true => take(&mut at, calls)?.iter().map(|id| u16::from(*id)).collect(),
        false => take(&mut at, 2 * calls)?
            .as_chunks()
            .0
            .iter()
            .map(|id| u16::from_le_bytes(*id))
            .collect(),
    };
    let weights = take(&mut at, 2 * calls)?.as_chunks().0;
    let weights = weights.iter().map(|weight| f16::from_le_bytes(*weight).to_f32()).collect();
    *rest = at;
    Some(Batch { layer: layer.into(), experts, weights })
}

fn check_batch(batch: &Batch, number: usize, shape: &Shape) -> Result<(), Refusal> {
    let refuse = |found: String, least, end: usize| {
        Err((format!("{found} in batch {number}"), format!("{least} to {}", end - 1)))
    };
    if batch.layer >= shape.expert_bytes.len() {
        return refuse(format!("layer {}", batch.layer), 0, shape.expert_bytes.len());
    }
    match batch.experts.iter().find(|expert| usize::from(**expert) >= shape.n_experts) {
        Some(expert) => refuse(format!("expert {expert}"), 0, shape.n_experts),
        None => Ok(()),
    }
}

fn take<'a>(rest: &mut &'a [u8], len: usize) -> Option<&'a [u8]> {
    let (taken, left) = rest.split_at_checked(len)?;
    *rest = left;
    Some(taken)
}

/// Whether there is a file that nobody wants a trace in place of: a model, a text.
fn holds_something_else(path: &Path) -> bool {
    let holds_bytes = |meta: std::fs::Metadata| meta.is_file() && meta.len() > 0;
    if !path.metadata().is_ok_and(holds_bytes) {
        return false;
    }
    // Any version of the format.
    let name = &MAGIC[..MAGIC.len() - 1];
    let mut start = vec![0; name.len()];
    let read = File::open(path).and_then(|mut file| file.read_exact(&mut start));
    read.is_err() || start != name
}

/// Whether an expert's id fits a byte.
fn is_narrow(n_experts: usize) -> bool {
    n_experts <= 256
}

/// Writes a trace as the engine runs.
pub(crate) struct Recorder {
    path: PathBuf,
    n_experts: usize,
    out: Mutex<BufWriter<File>>,
}

impl Recorder {
    /// Starts a trace of `model`, in place of another trace at most.
    pub(crate) fn create(path: &Path, model: &Model) -> Result<Recorder> {
        if holds_something_else(path) {
            return Err(Error::Trace {
                path: path.to_owned(),
                found: "a file that is no routing trace".to_owned(),
                expected: "none, or a trace to replace".to_owned(),
            });
        }
        let file =
            File::create(path).map_err(|source| Error::Io { path: path.to_owned(), source })?;
        let spec = &model.spec;
        let (out, n_experts) = (Mutex::new(BufWriter::new(file)), spec.n_experts);
        let recorder = Recorder { path: path.to_owned(), n_experts, out };
        let mut header = MAGIC.to_vec();
        for number in [model.experts.len(), n_experts, spec.n_used] {
            header.extend((number as u16).to_le_bytes());
        }
        for layer in &model.experts {
            header.extend((layer.bytes_per_expert() as u64).to_le_bytes());
        }
        recorder.write(&header)?;
        Ok(recorder)
    }

    /// Appends what the gate chose for a batch.
    pub(crate) fn record(&self, layer: usize, routing: &Routing) -> Result<()> {
        let mut record = (layer as u16).to_le_bytes().to_vec();
        record.extend((routing.rows() as u32).to_le_bytes());
        match is_narrow(self.n_experts) {
            true => record.extend(routing.experts.iter().map(|id| *id as u8)),
            false => record.extend(routing.experts.iter().flat_map(|id| id.to_le_bytes())),
        }
        record.extend(routing.weights.iter().flat_map(|w| f16::from_f32(*w).to_le_bytes()));
        self.write(&record)
    }

    fn write(&self, bytes: &[u8]) -> Result<()> {
        let mut out = self.out.lock().expect("nothing panics under this lock");
        out.write_all(bytes).map_err(|source| Error::Io { path: self.path.clone(), source })
    }
}

impl Drop for Recorder {
    fn drop(&mut self) {
        let out = self.out.get_mut().expect("nothing panics under this lock");
        if let Err(error) = out.flush() {
            tracing::warn!(path = %self.path.display(), %error, "the trace's end is lost");
        }
    }
}
