//! Checks a `Forward` request, field by field, before anything is allocated on its claims.

use outrigger_experts::Fingerprint;
use outrigger_proto::encoding::{Decoded, decode};
use outrigger_proto::v1::{Encoding, ForwardRequest, Group};
use tonic::Status;

use crate::shard::{DOWN, Shard};

/// A request that was found good: what to compute.
pub(crate) struct Work {
    /// A layer that is held.
    pub(crate) layer: usize,
    /// At least 1.
    pub(crate) rows: usize,
    /// `[rows, width]`, all finite.
    pub(crate) activations: Decoded,
    /// Ascending by expert; all held.
    pub(crate) groups: Vec<ExpertRows>,
    /// One of those that are offered.
    pub(crate) reply: Encoding,
    /// Tells its connection from the others that are open.
    pub(crate) device: usize,
    /// What the device calls the request, for the log.
    pub(crate) trace: Option<String>,
}

impl Work {
    /// Rows times experts: what there is to compute.
    pub(crate) fn expert_rows(&self) -> usize {
        self.groups.iter().map(|group| group.rows.len()).sum()
    }
}

/// One expert and the rows that it runs for, ascending, each with its routed weight.
pub(crate) struct ExpertRows {
    pub(crate) expert: u16,
    pub(crate) rows: Vec<(u32, f32)>,
}

/// What to compute for `device`, which calls it `trace`, and the experts asked for that are not held, ascending.
pub(crate) fn check(
    shard: &Shard,
    request: ForwardRequest,
    device: usize,
    trace: Option<String>,
) -> Result<(Work, Vec<u32>), Status> {
    check_fingerprint(shard, &request.fingerprint)?;
    check_layer(shard, request.layer)?;
    let rows = request.rows;
    if rows == 0 || rows > shard.max_rows {
        return Err(invalid("rows", format!("{rows}, expected 1 to {}", shard.max_rows)));
    }
    let encoding = one_of("encoding", request.encoding, &shard.up)?;
    let reply = one_of("reply", request.reply, &DOWN)?;
    check_groups(shard, rows, &request.groups)?;
    let activations = decode(encoding, rows as usize, shard.width(), &request.activations)
        .map_err(|error| invalid("activations", error))?;

    let (held, not_held): (Vec<Group>, Vec<Group>) =
        request.groups.into_iter().partition(|group| shard.experts.contains(&group.expert));
    let groups = held.into_iter().map(|group| ExpertRows {
        // A model has fewer experts than a u16 counts, and the group's is one of them.
        expert: group.expert as u16,
        rows: group.rows.into_iter().zip(group.weights).collect(),
    });
    let (layer, rows, groups) = (request.layer as usize, rows as usize, groups.collect());
    let not_held = not_held.iter().map(|group| group.expert).collect();
    Ok((Work { layer, rows, activations, groups, reply, device, trace }, not_held))
}

fn check_fingerprint(shard: &Shard, bytes: &[u8]) -> Result<(), Status> {
    let Ok(fingerprint) = Fingerprint::try_from(bytes) else {
        return Err(invalid("fingerprint", format!("{} bytes, expected 32", bytes.len())));
    };
    if fingerprint == shard.fingerprint {
        return Ok(());
    }
    let (ours, name) = (shard.fingerprint, &shard.model.spec.name);
    Err(Status::failed_precondition(format!(
        "fingerprint: the request is for model {fingerprint}, this server has {ours} ({name})"
    )))
}

fn check_layer(shard: &Shard, layer: u32) -> Result<(), Status> {
    let (first, last) = (shard.layers.start(), shard.layers.end());
    if shard.layers.contains(&layer) {
        return Ok(());
    }
    Err(invalid("layer", format!("{layer}, this server holds {first} to {last}")))
}

/// The encoding with this number, if it is one of `supported`.
fn one_of(field: &str, number: i32, supported: &[Encoding]) -> Result<Encoding, Status> {
    supported.iter().copied().find(|&encoding| encoding as i32 == number).ok_or_else(|| {
        let found = Encoding::try_from(number)
            .map_or_else(|_| number.to_string(), |encoding| encoding.as_str_name().to_owned());
        let names: Vec<&str> = supported.iter().map(Encoding::as_str_name).collect();
        invalid(field, format!("{found}, expected {}", names.join(" or ")))
    })
}

fn check_groups(shard: &Shard, rows: u32, groups: &[Group]) -> Result<(), Status> {
    let mut previous = None;
    for (g, group) in groups.iter().enumerate() {
        let expert = group.expert;
        let field = |name: &str| format!("groups[{g}].{name}");
        if expert >= shard.n_experts() {
            let last = shard.n_experts() - 1;
            return Err(invalid(field("expert"), format!("{expert}, expected 0 to {last}")));
        }
        if let Some(previous) = previous.replace(expert)
            && expert <= previous
        {
            return Err(invalid(field("expert"), format!("{expert} after {previous}: ascending")));
        }
        check_rows(&group.rows, rows).map_err(|why| invalid(field("rows"), why))?;
        check_weights(&group.weights, group.rows.len())
            .map_err(|why| invalid(field("weights"), why))?;
    }
    Ok(())
}

/// At least one row, each below `count`, ascending without repetition.
fn check_rows(rows: &[u32], count: u32) -> Result<(), String> {
    if rows.is_empty() {
        return Err("none, expected at least one".into());
    }
    if let Some(row) = rows.iter().find(|&&row| row >= count) {
        return Err(format!("{row}, expected 0 to {}", count - 1));
    }
    match rows.windows(2).find(|pair| pair[0] >= pair[1]) {
        Some(pair) => Err(format!("{} after {}: ascending", pair[1], pair[0])),
        None => Ok(()),
    }
}

fn check_weights(weights: &[f32], rows: usize) -> Result<(), String> {
    if weights.len() != rows {
        return Err(format!("{}, expected {rows}: one a row", weights.len()));
    }
    match weights.iter().position(|weight| !weight.is_finite()) {
        Some(at) => Err(format!("weight {at} is {}, expected a finite number", weights[at])),
        None => Ok(()),
    }
}

fn invalid(field: impl std::fmt::Display, why: impl std::fmt::Display) -> Status {
    Status::invalid_argument(format!("{field}: {why}"))
}
