//! Sending a layer's remote groups, and believing nothing that comes back unchecked.

use std::time::Duration;

use bytes::Bytes;
use outrigger_experts::{ActFormat, Activations};
use outrigger_proto::REQUEST_ID;
use outrigger_proto::encoding;
use outrigger_proto::v1::{self, Encoding, ForwardRequest, ForwardResponse};
use outrigger_router::{Group, Partial};
use prost::Message as _;
use tokio::runtime::{Handle, RuntimeFlavor};
use tokio::task::JoinSet;
use tokio::time::Instant;

use super::Fleet;
use super::error::CallError;
use crate::config::{OnMiss, Reply};

/// How long a thread that waits for answers stays awake: longer than a server on the same machine takes.
const AWAKE: Duration = Duration::from_millis(4);

/// What goes to the servers for one layer.
pub(crate) struct Outgoing<'a> {
    pub(crate) layer: usize,
    /// Position of the pass's first row, which with the layer names the calls in logs on both sides.
    pub(crate) token: usize,
    /// Each server's share, by ascending server.
    pub(crate) shares: Vec<(u16, Vec<Group>)>,
    /// The layer's normed activations, already in `format`.
    pub(crate) x: &'a Activations,
    pub(crate) format: ActFormat,
}

/// Calls on the wire. Dropping it cancels them.
pub(crate) struct Flight {
    calls: JoinSet<Landed>,
    /// Some server is so near that it is worth staying awake for.
    near: bool,
}

/// One server's share after its call ended.
pub(crate) struct Landed {
    pub(crate) server: u16,
    pub(crate) share: Vec<Group>,
    pub(crate) bytes_up: u64,
    pub(crate) bytes_down: u64,
    pub(crate) answer: Result<Answer, CallError>,
}

/// A checked answer.
pub(crate) struct Answer {
    /// The rows that the sums are for, ascending.
    pub(crate) rows: Vec<u32>,
    /// One weighted sum a row, `[rows, width]`.
    pub(crate) sums: Vec<f64>,
    /// Experts of the share that the server does not hold or cannot read, ascending.
    pub(crate) not_run: Vec<u16>,
}

impl Answer {
    /// The sums as a partial over all rows of the pass, covering the groups that ran.
    pub(crate) fn spread(&self, ran: &[Group], rows: usize, width: usize) -> Partial {
        let mut partial = Partial::zeros(rows, width);
        for (&row, sum) in self.rows.iter().zip(self.sums.chunks_exact(width)) {
            partial.sums[row as usize * width..][..width].copy_from_slice(sum);
        }
        partial.cover(ran);
        partial
    }
}

impl Flight {
    /// Waits until every call has ended: answered, failed or late. Sorted by server, so that sums are added in the
    /// same order whatever the order of arrival.
    pub(crate) async fn land(mut self) -> Vec<Landed> {
        let mut landed = self.land_awake().await;
        landed.extend(self.calls.join_all().await);
        landed.sort_unstable_by_key(|call| call.server);
        landed
    }

    /// What ends within a moment, without going to sleep: on many machines it takes longer to wake up than a server
    /// nearby takes to be asked. Where this thread also runs the calls, as in a simulation, it sleeps.
    async fn land_awake(&mut self) -> Vec<Landed> {
        let mut landed = Vec::new();
        if !self.near || Handle::current().runtime_flavor() != RuntimeFlavor::MultiThread {
            return landed;
        }
        let until = Instant::now() + AWAKE;
        while !self.calls.is_empty() && Instant::now() < until {
            match self.calls.try_join_next() {
                Some(call) => landed.push(call.expect("calls do not panic")),
                // Whoever has the answer may need this core to bring it.
                None => std::thread::yield_now(),
            }
            tokio::task::yield_now().await;
        }
        landed
    }
}

pub(super) async fn start(fleet: &Fleet, outgoing: Outgoing<'_>, patience: Duration) -> Flight {
    let (mut calls, mut near) = (JoinSet::new(), false);
    for (id, share) in outgoing.shares {
        let Some(server) = fleet.server(id) else {
            // It has left since the work was placed.
            let answer = Err(CallError::gone());
            let gone = Landed { server: id, share, bytes_up: 0, bytes_down: 0, answer };
            calls.spawn(async { gone });
            continue;
        };
        near |= server.trip() < AWAKE;
        let rows = named_rows(&share);
        let request = ForwardRequest {
            request_id: fleet.next_request_id(),
            fingerprint: Bytes::copy_from_slice(fleet.shared.identity.fingerprint.as_bytes()),
            layer: outgoing.layer as u32,
            rows: rows.len() as u32,
            encoding: wire_format(outgoing.format).into(),
            activations: encode_rows(outgoing.x, outgoing.format, &rows),
            groups: wire_groups(&share, &rows),
            reply: reply_encoding(fleet.shared.config.reply).into(),
        };
        let bytes_up = request.encoded_len() as u64;
        let name = format!("t{}-l{}", outgoing.token, outgoing.layer);
        let width = fleet.shared.identity.width;
        let started = Instant::now();
        let expert_rows = share.iter().map(|group| group.rows.len()).sum();
        let usual = match fleet.shared.config.on_miss {
            OnMiss::Wait => patience,
            OnMiss::Degrade | OnMiss::Fail => server.deadline(expert_rows),
        };
        let limit = usual.min(patience);
        calls.spawn(async move {
            let expected = Expected::of(&request, &share, width);
            let called = async {
                let mut client = server.client().ok_or_else(CallError::gone)?;
                let mut call = tonic::Request::new(request);
                call.metadata_mut().insert(REQUEST_ID, name.parse().expect("it is ASCII"));
                Ok(client.forward(call).await?.into_inner())
            };
            let response = match tokio::time::timeout(limit, called).await {
                Ok(response) => response,
                Err(_) if limit < usual => Err(CallError::Impatient(limit)),
                Err(_) => Err(CallError::Timeout(limit)),
            };
            let bytes_down = response.as_ref().map_or(0, |r| r.encoded_len() as u64);
            let answer = response.and_then(|response| {
                let answer = expected.check(response, rows)?;
                server.on_success(started.elapsed(), expert_rows);
                Ok(answer)
            });
            if let Err(error) = &answer {
                server.on_failure(error);
            }
            Landed { server: id, share, bytes_up, bytes_down, answer }
        });
    }
    if !calls.is_empty() {
        // A runtime's thread would run them only after what is computed on it meanwhile.
        tokio::task::yield_now().await;
    }
    Flight { calls, near }
}

/// What an answer must look like to be believed.
struct Expected {
    request_id: u64,
    layer: u32,
    rows: usize,
    width: usize,
    experts: Vec<u16>,
    reply: Encoding,
}

impl Expected {
    fn of(request: &ForwardRequest, share: &[Group], width: usize) -> Expected {
        Expected {
            request_id: request.request_id,
            layer: request.layer,
            rows: request.rows as usize,
            width,
            experts: share.iter().map(|group| group.expert).collect(),
            reply: request.reply(),
        }
    }

    fn check(&self, response: ForwardResponse, rows: Vec<u32>) -> Result<Answer, CallError> {
        let same = |field: &str, found: u64, expected: u64| match found == expected {
            true => Ok(()),
            false => Err(CallError::BadAnswer(format!("{field} {found}, expected {expected}"))),
        };
        same("request_id", response.request_id, self.request_id)?;
        same("layer", response.layer.into(), self.layer.into())?;
        same("rows", response.rows.into(), self.rows as u64)?;
        if !response.not_run.is_sorted_by(|a, b| a < b) {
            return Err(CallError::BadAnswer("not_run is not ascending".to_owned()));
        }
        let mut not_run = Vec::new();
        for &expert in &response.not_run {
            match u16::try_from(expert).ok().filter(|e| self.experts.contains(e)) {
                Some(expert) => not_run.push(expert),
                None => return Err(CallError::BadAnswer(format!("not_run names expert {expert}"))),
            }
        }
        let (encoding, rows_sent) = (response.encoding(), self.rows);
        // Sums that do not fit an f16 come as f32.
        let wider = self.reply == Encoding::F16 && encoding == Encoding::F32;
        if encoding != self.reply && !wider {
            let (found, expected) = (encoding.as_str_name(), self.reply.as_str_name());
            return Err(CallError::BadAnswer(format!("encoding {found}, expected {expected}")));
        }
        let sums = encoding::decode_sums(encoding, rows_sent, self.width, &response.sums)
            .map_err(|error| CallError::BadAnswer(error.to_string()))?;
        Ok(Answer { rows, sums, not_run })
    }
}

/// The rows that any group names, ascending: only these travel.
fn named_rows(share: &[Group]) -> Vec<u32> {
    let mut rows: Vec<u32> = share.iter().flat_map(|group| &group.rows).map(|row| row.0).collect();
    rows.sort_unstable();
    rows.dedup();
    rows
}

fn wire_groups(share: &[Group], rows: &[u32]) -> Vec<v1::Group> {
    let place = |row: &u32| rows.binary_search(row).expect("every named row travels") as u32;
    let group = |group: &Group| v1::Group {
        expert: group.expert.into(),
        rows: group.rows.iter().map(|(row, _)| place(row)).collect(),
        weights: group.rows.iter().map(|(_, weight)| *weight).collect(),
    };
    share.iter().map(group).collect()
}

fn wire_format(format: ActFormat) -> Encoding {
    match format {
        ActFormat::F32 => Encoding::F32,
        ActFormat::Q8_0 => Encoding::Q80,
        ActFormat::Q8_K => Encoding::Q8K,
    }
}

fn reply_encoding(reply: Reply) -> Encoding {
    match reply {
        Reply::Exact => Encoding::F48,
        Reply::F32 => Encoding::F32,
        Reply::F16 => Encoding::F16,
    }
}

/// The rows in the kernel's own blocks: the very numbers that the device would have computed with.
fn encode_rows(x: &Activations, format: ActFormat, rows: &[u32]) -> Bytes {
    match format {
        ActFormat::F32 => encoding::encode_f32(&gather(x.f32(), x.rows(), rows)),
        ActFormat::Q8_0 => {
            let (scales, values) = x.q8_0();
            encoding::encode_q8_0(&gather(scales, x.rows(), rows), &gather(values, x.rows(), rows))
        }
        ActFormat::Q8_K => {
            let (scales, values) = x.q8_k();
            encoding::encode_q8_k(&gather(scales, x.rows(), rows), &gather(values, x.rows(), rows))
        }
    }
}

fn gather<T: Copy>(all: &[T], total: usize, rows: &[u32]) -> Vec<T> {
    let width = all.len() / total;
    rows.iter().flat_map(|&row| &all[row as usize * width..][..width]).copied().collect()
}
