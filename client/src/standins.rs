//! Where the approximations that stand in for experts come from.

use std::path::Path;

use outrigger_experts::{Model, StandIn};

use crate::error::{Error, Result};

/// The approximations of `model`'s experts, by layer and expert: its own if it is a pack, else those of the pack at
/// `path`.
///
/// # Errors
/// A file that cannot be opened, is no pack, or is one of another model.
pub(crate) fn open(model: &Model, path: Option<&Path>) -> Result<Vec<Vec<Option<StandIn>>>> {
    let Some(path) = path else { return Ok(model.standins.clone()) };
    let pack = Model::open(path)?;
    let wrong = |found: String, expected: String| {
        Err(Error::StandIns { path: path.to_owned(), found, expected })
    };
    if !pack.is_pack() {
        return wrong("a full model".to_owned(), "a pack, made by `outrigger pack`".to_owned());
    }
    let (expected, found) = (model.gguf.fingerprint(), pack.gguf.fingerprint());
    if found != expected {
        return wrong(format!("a pack of model {found}"), format!("one of model {expected}"));
    }
    Ok(pack.all_standins())
}
