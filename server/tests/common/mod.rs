//! A server on a loopback port, a client of it, and the local computation to compare with.

// Each test file uses a part.
#![allow(dead_code)]

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use outrigger_experts::gguf::{Layout, Writer};
use outrigger_experts::{
    ActFormat, Activations, FfnScratch, GgmlType, Group as LocalGroup, Model, Pool, quantize,
    run_experts,
};
use outrigger_proto::encoding::{
    Decoded, decode, encode_f16, encode_f32, encode_q8_0, encode_q8_k,
};
use outrigger_proto::v1::experts_client::ExpertsClient;
use outrigger_proto::v1::{Encoding, ForwardRequest, ForwardResponse, Group};
use outrigger_server::{ExpertServer, Metrics, Result, ServerConfig, Tenants, bind};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tonic::transport::{Channel, Endpoint};

/// Longer than any test needs, so that one that hangs fails.
pub(crate) const LONG: Duration = Duration::from_secs(60);

pub(crate) fn repo(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(path)
}

/// Q8_0 experts, 6 layers of 32, width 256.
pub(crate) fn demo() -> PathBuf {
    repo("models/demo.gguf")
}

/// F32 experts, 2 layers of 8, width 64.
pub(crate) fn olmoe() -> PathBuf {
    repo("tests/fixtures/olmoe/model.gguf")
}

/// Sheds nothing for its wait, which depends on the machine.
pub(crate) fn config(model: &Path) -> ServerConfig {
    ServerConfig { model: model.to_owned(), threads: 2, max_wait: LONG, ..ServerConfig::default() }
}

/// Those of a file, which is gone afterwards: that changes nothing.
pub(crate) fn tenants(lines: &str) -> Tenants {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(&file, lines).unwrap();
    Tenants::read(file.path()).unwrap()
}

/// A server in this process, and a client that is connected to it.
pub(crate) struct Running {
    pub(crate) url: String,
    pub(crate) client: ExpertsClient<Channel>,
    pub(crate) channel: Channel,
    pub(crate) metrics: Arc<Metrics>,
    stop: oneshot::Sender<()>,
    served: JoinHandle<Result<()>>,
}

pub(crate) async fn start(config: ServerConfig) -> Running {
    let server = ExpertServer::open(config).unwrap();
    let metrics = server.metrics();
    let incoming = bind("127.0.0.1:0".parse().unwrap()).await.unwrap();
    let url = format!("http://{}", incoming.local_addr().unwrap());
    let (stop, stopped) = oneshot::channel();
    let served = tokio::spawn(server.serve(incoming, None, async {
        let _ = stopped.await;
    }));
    let channel = Endpoint::from_shared(url.clone())
        .unwrap()
        .timeout(LONG)
        .connect()
        .await
        .expect("connects");
    let client = ExpertsClient::new(channel.clone()).max_decoding_message_size(64 << 20);
    Running { url, client, channel, metrics, stop, served }
}

impl Running {
    /// The value of a line of the metrics, 0 if there is none.
    pub(crate) fn metric(&self, name: &str) -> f64 {
        metric(&self.metrics, name)
    }

    /// Asks the server to stop, without waiting.
    pub(crate) fn ask_to_stop(self) -> JoinHandle<Result<()>> {
        self.stop.send(()).expect("the server runs");
        self.served
    }
}

/// The value of a line of the metrics, labels included in `name`; 0 if there is none.
pub(crate) fn metric(metrics: &Metrics, name: &str) -> f64 {
    let text = metrics.text();
    let line = text.lines().find_map(|line| {
        line.strip_prefix("outrigger_server_")?.strip_prefix(name)?.strip_prefix(' ')
    });
    line.map_or(0.0, |value| value.parse().unwrap())
}

/// One expert with the rows that it runs for and their weights.
pub(crate) type Rows = (u32, Vec<(u32, f32)>);

/// Activations of one layer with the experts to run on them.
#[derive(Clone)]
pub(crate) struct Job {
    pub(crate) layer: u32,
    pub(crate) rows: usize,
    pub(crate) values: Vec<f32>,
    pub(crate) groups: Vec<Rows>,
}

impl Job {
    /// Random rows, each routed to `used` experts.
    pub(crate) fn random(model: &Model, layer: u32, rows: usize, used: usize, seed: u64) -> Job {
        let mut random = Random(seed);
        let values = (0..rows * model.spec.n_embd).map(|_| random.signed()).collect();
        let mut groups: Vec<Rows> =
            (0..model.spec.n_experts as u32).map(|e| (e, Vec::new())).collect();
        for row in 0..rows as u32 {
            let first = random.below(groups.len());
            for k in 0..used {
                let expert = (first + k * 3) % model.spec.n_experts;
                if !groups[expert].1.iter().any(|&(r, _)| r == row) {
                    groups[expert].1.push((row, random.signed()));
                }
            }
        }
        groups.retain(|(_, rows)| !rows.is_empty());
        Job { layer, rows, values, groups }
    }

    pub(crate) fn request(&self, model: &Model, encoding: Encoding) -> ForwardRequest {
        let mut x = Activations::new(model.spec.n_embd);
        x.set(&self.values);
        let activations = match encoding {
            Encoding::F16 => encode_f16(&self.values).unwrap(),
            Encoding::Q80 => {
                x.quantize(ActFormat::Q8_0);
                encode_q8_0(x.q8_0().0, x.q8_0().1)
            }
            Encoding::Q8K => {
                x.quantize(ActFormat::Q8_K);
                encode_q8_k(x.q8_k().0, x.q8_k().1)
            }
            _ => encode_f32(&self.values),
        };
        let groups = self.groups.iter().map(|(expert, rows)| Group {
            expert: *expert,
            rows: rows.iter().map(|row| row.0).collect(),
            weights: rows.iter().map(|row| row.1).collect(),
        });
        ForwardRequest {
            request_id: 7,
            fingerprint: model.gguf.fingerprint().as_bytes().to_vec().into(),
            layer: self.layer,
            rows: self.rows as u32,
            encoding: encoding.into(),
            activations,
            groups: groups.collect(),
            reply: Encoding::F32.into(),
        }
    }

    /// What the device itself would have computed, on one thread, of the experts that `runs` picks.
    pub(crate) fn local(&self, model: &Model, runs: impl Fn(u32) -> bool) -> Vec<f32> {
        let mut x = Activations::new(model.spec.n_embd);
        x.set(&self.values);
        let picked: Vec<_> = self
            .groups
            .iter()
            .filter(|(expert, _)| runs(*expert))
            .map(|(e, rows)| (model.experts[self.layer as usize].expert(*e as usize), rows))
            .collect();
        let groups: Vec<LocalGroup<'_>> = picked
            .iter()
            .map(|(expert, rows)| LocalGroup {
                gate_proj: expert.gate_proj.mat(),
                up_proj: expert.up_proj.mat(),
                down_proj: expert.down_proj.mat(),
                rows,
            })
            .collect();
        let mut out = vec![0.0f64; self.rows * model.spec.n_embd];
        run_experts(&Pool::new(1), &mut x, &groups, &mut FfnScratch::default(), &mut out);
        out.into_iter().map(|sum| sum as f32).collect()
    }
}

/// The sums of an answer.
pub(crate) fn sums(model: &Model, answer: &ForwardResponse) -> Vec<f32> {
    let (rows, width) = (answer.rows as usize, model.spec.n_embd);
    match decode(answer.encoding(), rows, width, &answer.sums).unwrap() {
        Decoded::F32(sums) => sums,
        other => panic!("sums as {other:?}"),
    }
}

/// SplitMix64.
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// From -1 to 1.
    pub(crate) fn signed(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    }

    pub(crate) fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }
}

/// A Mixtral of one layer with random experts of type `ty`: 4 of them, width 256.
pub(crate) fn write_model(path: &Path, ty: GgmlType) {
    const WIDTH: usize = 256;
    let mut layout = Layout::new(path);
    layout.set("general.architecture", "llama");
    for (key, value) in [
        ("block_count", 1u32),
        ("context_length", 64),
        ("embedding_length", WIDTH as u32),
        ("feed_forward_length", WIDTH as u32),
        ("attention.head_count", 4),
        ("expert_count", 4),
        ("expert_used_count", 2),
    ] {
        layout.set(&format!("llama.{key}"), value);
    }
    layout.set("llama.attention.layer_norm_rms_epsilon", 1e-5f32);
    layout.set("llama.rope.freq_base", 10000f32);
    let (f32, square) = (GgmlType::F32, [WIDTH, WIDTH]);
    let tensors: [(&str, GgmlType, &[usize]); 12] = [
        ("token_embd", f32, &[WIDTH, 8]),
        ("output_norm", f32, &[WIDTH]),
        ("blk.0.attn_norm", f32, &[WIDTH]),
        ("blk.0.attn_q", f32, &square),
        ("blk.0.attn_k", f32, &square),
        ("blk.0.attn_v", f32, &square),
        ("blk.0.attn_output", f32, &square),
        ("blk.0.ffn_norm", f32, &[WIDTH]),
        ("blk.0.ffn_gate_inp", f32, &[WIDTH, 4]),
        ("blk.0.ffn_gate_exps", ty, &[WIDTH, WIDTH, 4]),
        ("blk.0.ffn_up_exps", ty, &[WIDTH, WIDTH, 4]),
        ("blk.0.ffn_down_exps", ty, &[WIDTH, WIDTH, 4]),
    ];
    for (name, ty, dims) in tensors {
        layout.tensor(&format!("{name}.weight"), ty, dims).unwrap();
    }
    let mut writer = Writer::create(layout).unwrap();
    let mut random = Random(1);
    for (_, ty, dims) in tensors {
        let values: Vec<f32> = (0..dims.iter().product()).map(|_| random.signed() * 0.1).collect();
        let mut bytes = Vec::new();
        quantize(ty, &values, &mut bytes);
        writer.write(&bytes).unwrap();
    }
    writer.finish().unwrap();
}
