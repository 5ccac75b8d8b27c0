//! A pack on the device and the full model on the server are one model; offline, the pack speaks for itself.

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use half::f16;
use outrigger::pack::{Choice, PackConfig, Packed, Summary, pack};
use outrigger::{Budget, Elsewhere, Engine, EngineConfig, Model, Prediction};
use outrigger_experts::gguf::{Layout, Writer};
use outrigger_experts::{ExpertStore, GgmlType, StandIn, Tensor};
use outrigger_server::{ExpertServer, ServerConfig};
use outrigger_tests::fixtures::{demo_model, repository, tiny_model, tokens};
use outrigger_tests::loopback::LoopbackServer;
use outrigger_tests::{all_logits, greedy};

const TEXT: &str = "It was a dark and stormy night; the rain fell in torrents, and the old man by the fire had \
    begun to tell of the sea when there was a knock at the door.";

/// A pack of `model`, fitted to a little text.
async fn packed(model: &Path, budget: f64, out: &Path) -> Packed {
    let text = std::fs::read_to_string(repository("client/src/cli/calibration.txt"));
    let config = PackConfig {
        model: model.to_owned(),
        out: out.to_owned(),
        budget: Budget::Fraction(budget),
        calibration: vec![text.expect("it is there")],
        tokens: 4096,
        threads: 2,
    };
    pack(&config, |_, _, _| ()).await.expect("it packs")
}

async fn engine(model: &Path, change: impl FnOnce(&mut EngineConfig)) -> Arc<Engine> {
    let mut config = EngineConfig::new(model);
    config.deadline = Duration::from_secs(20);
    change(&mut config);
    Engine::open(config).await.expect("it opens")
}

/// Perplexity of `logits` on `ids`, and the mean acceptance by those of the full model.
fn quality(logits: &[f32], full: &[f32], ids: &[u32]) -> (f64, f64) {
    let vocab = full.len() / ids.len();
    let rows = logits.chunks_exact(vocab).zip(full.chunks_exact(vocab)).zip(&ids[1..]);
    let (mut loss, mut acceptance) = (0.0, 0.0);
    for ((row, full), next) in rows {
        let (row, full) = (Prediction::new(row), Prediction::new(full));
        loss += row.surprise(*next);
        acceptance += row.distance(&full).acceptance;
    }
    let n = (ids.len() - 1) as f64;
    ((loss / n).exp(), acceptance / n)
}

#[tokio::test(flavor = "multi_thread")]
async fn connected_it_is_the_full_model_and_offline_it_says_what_it_is() {
    let dir = tempfile::tempdir().expect("a directory");
    let out = dir.path().join("pack.gguf");
    let made = packed(&demo_model(), 0.35, &out).await;
    assert!(made.expert_bytes <= made.full_expert_bytes * 35 / 100);
    let full = engine(&demo_model(), |_| ()).await;
    let ids = full.tokenizer().encode(TEXT, true, true);
    let exact = all_logits(&full, &ids, 1).await;

    let server = LoopbackServer::start(&demo_model(), None).await;
    let device = engine(&out, |config| config.servers = vec![server.address.to_string()]).await;
    assert!(device.wait_connected(Duration::from_secs(10)).await);
    assert_eq!(all_logits(&device, &ids, 4).await, exact);

    device.set_offline(true);
    let mut session = greedy(&device);
    session.push(&ids).expect("they fit");
    let mut logits = Vec::new();
    let pass = session.advance_all(|rows| logits.extend_from_slice(rows)).await.expect("a pass");
    for row in 0..pass.rows() {
        let (coverage, standin) = (pass.coverage(row), pass.standin(row));
        assert!(coverage < 1.0 && standin > 0.0, "row {row}: {coverage} {standin}");
        assert!((coverage + standin - 1.0).abs() < 1e-5, "row {row}: {coverage} {standin}");
    }
    assert_eq!((pass.tally.standin, session.settled()), (pass.tally.missing, 0));
    let (perplexity, acceptance) = quality(&logits, &exact, &ids);
    let (full_perplexity, _) = quality(&exact, &exact, &ids);
    assert!(perplexity < 1.3 * full_perplexity, "{perplexity} {full_perplexity}");
    assert!(acceptance > 0.85, "{acceptance}");

    // Connected again, it heals.
    device.set_offline(false);
    assert!(device.wait_connected(Duration::from_secs(10)).await);
    session.settle().await.expect("it settles");
    assert_eq!(session.settled(), ids.len());
    assert_eq!(session.logits(), &exact[exact.len() - session.logits().len()..]);
}

/// The oracle: a full model whose experts are what the pack's stand for, in Q8_0 blocks of each row's own scale. Those hold
/// the very same numbers, so that nothing may differ.
#[tokio::test(flavor = "multi_thread")]
async fn offline_it_computes_what_its_codes_mean() {
    let dir = tempfile::tempdir().expect("a directory");
    for architecture in ["qwen2moe", "mixtral"] {
        let out = dir.path().join(format!("{architecture}.gguf"));
        let unpacked = dir.path().join(format!("{architecture}-q8_0.gguf"));
        packed(&tiny_model(architecture), 0.09, &out).await;
        let pack = Model::open(&out).expect("it is a model");
        unpack(&pack, &unpacked);
        let ids = tokens(architecture);
        let got = all_logits(&engine(&out, |_| ()).await, &ids, 1).await;
        let want = all_logits(&engine(&unpacked, |_| ()).await, &ids, 1).await;
        assert_eq!(got, want, "{architecture}");
    }
}

/// Writes a full model with the experts of `pack`, all of them coded, as Q8_0.
fn unpack(pack: &Model, path: &Path) {
    let spec = &pack.spec;
    let (n_embd, n_ff, n) = (spec.n_embd, spec.n_ff, spec.n_experts);
    let mut layout = Layout::new(path);
    for (key, value) in pack.gguf.meta().iter().filter(|(key, _)| !key.starts_with("outrigger.")) {
        layout.set(key, value.clone());
    }
    let per_expert =
        |name: &str| name.split('.').nth(3).is_some_and(|part| part.parse::<u32>().is_ok());
    let trunk: Vec<_> = pack.gguf.tensors().filter(|t| !per_expert(t.name())).collect();
    for tensor in &trunk {
        let ty = tensor.ty().expect("a type that is read");
        layout.tensor(tensor.name(), ty, tensor.dims()).expect("it fits");
    }
    let parts =
        [("gate", [n_embd, n_ff, n]), ("up", [n_embd, n_ff, n]), ("down", [n_ff, n_embd, n])];
    for layer in 0..spec.n_layers {
        for (part, dims) in parts {
            let name = format!("blk.{layer}.ffn_{part}_exps.weight");
            layout.tensor(&name, GgmlType::Q8_0, &dims).expect("it fits");
        }
    }
    let mut writer = Writer::create(layout).expect("it can be written");
    for tensor in &trunk {
        let tensor = pack.gguf.tensor(tensor.name()).expect("it is there");
        writer.write(tensor.bytes()).expect("room");
    }
    for layer in pack.all_standins() {
        for part in 0..3 {
            for standin in &layer {
                let Some(StandIn::Copy(t)) = standin else { panic!("no means at this budget") };
                let matrix = [&t.gate_proj, &t.up_proj, &t.down_proj][part];
                writer.write(&q8_0(matrix)).expect("room");
            }
        }
    }
    writer.finish().expect("it is whole");
}

/// A coded matrix as Q8_0: its values are whole multiples of their row's scale.
fn q8_0(matrix: &Tensor) -> Vec<u8> {
    assert!(matches!(matrix.ty(), GgmlType::Vq(_)), "{}", matrix.ty());
    let (values, cols) = (matrix.to_f32(), matrix.cols());
    let rows = matrix.bytes().chunks_exact(matrix.byte_len() / matrix.rows());
    let mut out = Vec::new();
    for (row, values) in rows.zip(values.chunks_exact(cols)) {
        let scale = f16::from_le_bytes([row[0], row[1]]);
        for block in values.chunks_exact(32) {
            out.extend(scale.to_le_bytes());
            out.extend(block.iter().map(|x| (x / scale.to_f32()).round() as i8 as u8));
        }
    }
    out
}

#[tokio::test(flavor = "multi_thread")]
async fn stand_ins_serve_what_a_cache_misses() {
    let dir = tempfile::tempdir().expect("a directory");
    let out = dir.path().join("pack.gguf");
    packed(&demo_model(), 0.15, &out).await;
    let full = engine(&demo_model(), |_| ()).await;
    let ids = full.tokenizer().encode(TEXT, true, true);
    let exact = all_logits(&full, &ids, 1).await;
    let half = |config: &mut EngineConfig, standins: Option<PathBuf>| {
        config.expert_cache = Budget::Fraction(0.5);
        config.elsewhere = Elsewhere::Absent;
        config.standins = standins;
    };
    let without = engine(&demo_model(), |config| half(config, None)).await;
    let with = engine(&demo_model(), |config| half(config, Some(out))).await;
    let without = all_logits(&without, &ids, 1).await;
    let with = all_logits(&with, &ids, 1).await;
    let lost = |(perplexity, _): (f64, f64)| (perplexity / quality(&exact, &exact, &ids).0).ln();
    let (without, with) = (quality(&without, &exact, &ids), quality(&with, &exact, &ids));
    assert!(lost(with) < 0.5 * lost(without), "{with:?} {without:?}");
    assert!(with.1 > without.1 + 0.1, "{with:?} {without:?}");
}

/// Turns one bit in the middle of a tensor over.
fn damage(tensor: &Tensor) {
    let file = File::options().read(true).write(true).open(tensor.mapping().path());
    let (file, middle) = (file.expect("it is there"), tensor.range().start + tensor.byte_len() / 2);
    let mut byte = [0];
    file.read_exact_at(&mut byte, middle as u64).expect("it is that long");
    byte[0] ^= 0x10;
    file.write_all_at(&byte, middle as u64).expect("room");
}

/// One tensor of what a pack has of an expert.
fn a_tensor(standin: &StandIn) -> &Tensor {
    match standin {
        StandIn::Copy(tensors) => &tensors.down_proj,
        StandIn::Mean(mean) => mean,
    }
}

/// The experts of a pack of which some byte is not what was written: the exact ones as the cache sees them, and the others.
fn bad_experts(pack: &Path) -> [Vec<(usize, usize)>; 2] {
    let model = Arc::new(Model::open(pack).expect("it is a model"));
    let store = ExpertStore::open(model.clone(), Budget::Fraction(1.0), Elsewhere::Absent);
    let store = store.expect("it opens");
    let (mut exact, mut others) = (Vec::new(), Vec::new());
    for (layer, standins) in model.standins.iter().enumerate() {
        let held = |e: &u16| model.experts[layer].holds(usize::from(*e));
        let held: Vec<u16> = (0..model.spec.n_experts as u16).filter(held).collect();
        let mut pinned = store.acquire(layer, &held).expect("they are experts");
        while !pinned.arrivals().is_empty() {}
        for refused in pinned.refused() {
            let why = refused.why.to_string();
            assert!(why.contains("pack.gguf") && why.contains("ffn_up"), "{why}");
            exact.push((layer, usize::from(refused.expert)));
        }
        let standins =
            standins.iter().enumerate().filter_map(|(e, held)| Some((e, held.as_ref()?)));
        let bad = standins.filter(|(_, standin)| !standin.is_whole());
        others.extend(bad.map(|(e, _)| (layer, e)));
    }
    [exact, others]
}

#[tokio::test(flavor = "multi_thread")]
async fn bytes_that_went_bad_are_not_used() {
    let dir = tempfile::tempdir().expect("a directory");
    let out = dir.path().join("pack.gguf");
    packed(&demo_model(), 0.6, &out).await;
    assert_eq!(bad_experts(&out), [vec![], vec![]]);
    let first = async || {
        let mut session = greedy(&engine(&out, |_| ()).await);
        session.push_text(TEXT).expect("it fits");
        session.step().await.expect("a token")
    };
    let token = first().await;
    assert!(token.coverage > 0.0 && token.standin > 0.0, "{token:?}");

    let model = Model::open(&out).expect("it is a model");
    let layers =
        (0..model.spec.n_layers).flat_map(|l| (0..model.spec.n_experts).map(move |e| (l, e)));
    let (exact, others): (Vec<_>, Vec<_>) = layers.partition(|&(l, e)| model.experts[l].holds(e));
    let of_exact = |&(l, e): &(usize, usize)| model.experts[l].expert(e).up_proj;
    let of_other = |&(l, e): &(usize, usize)| {
        a_tensor(model.standins[l][e].as_ref().expect("a pack has all")).clone()
    };
    damage(&of_exact(&exact[3]));
    damage(&of_other(&others[5]));
    assert_eq!(bad_experts(&out), [vec![exact[3]], vec![others[5]]]);

    exact.iter().filter(|at| **at != exact[3]).for_each(|at| damage(&of_exact(at)));
    others.iter().filter(|at| **at != others[5]).for_each(|at| damage(&of_other(at)));
    let token = first().await;
    assert_eq!((token.coverage, token.standin), (0.0, 0.0), "{token:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_summary_counts_what_the_file_has() {
    let dir = tempfile::tempdir().expect("a directory");
    for budget in [0.02, 0.9] {
        let out = dir.path().join("pack.gguf");
        let made = packed(&demo_model(), budget, &out).await;
        let model = Model::open(&out).expect("it is a model");
        let summary = Summary::of(&model).expect("it is well formed").expect("it is a pack");
        let count =
            |of: fn(&Choice) -> bool| made.choices.iter().flatten().filter(|c| of(c)).count();
        let exact = count(|choice| choice.is_exact());
        let mean = count(|choice| *choice == Choice::Mean);
        assert_eq!(summary.layers.iter().map(|layer| layer.exact).sum::<usize>(), exact);
        assert_eq!(summary.layers.iter().map(|layer| layer.mean).sum::<usize>(), mean);
        assert_eq!(summary.layers.iter().map(|layer| layer.bytes).sum::<u64>(), made.expert_bytes);
        assert!(if budget < 0.5 { mean > 50 && exact == 0 } else { exact > 50 }, "{exact} {mean}");
        assert!(summary.layers.iter().all(|layer| (0.0..1.0).contains(&layer.error)));
    }
    let full = Model::open(&demo_model()).expect("it is a model");
    assert!(Summary::of(&full).expect("it is well formed").is_none());
}

#[tokio::test(flavor = "multi_thread")]
async fn what_makes_no_sense_is_refused_and_named() {
    let dir = tempfile::tempdir().expect("a directory");
    let out = dir.path().join("pack.gguf");
    packed(&tiny_model("qwen3moe"), 0.3, &out).await;

    let config = ServerConfig { model: out.clone(), ..ServerConfig::default() };
    let error = ExpertServer::open(config).err().expect("a server takes no pack").to_string();
    assert!(error.contains("pack.gguf") && error.contains("full model"), "{error}");

    let refused = |model: PathBuf, change: fn(&mut EngineConfig, &Path), path: PathBuf| async move {
        let mut config = EngineConfig::new(model);
        change(&mut config, &path);
        Engine::open(config).await.expect_err("it is refused").to_string()
    };
    let standins = |config: &mut EngineConfig, path: &Path| config.standins = Some(path.to_owned());
    let other = refused(demo_model(), standins, out.clone()).await;
    assert!(other.contains("pack.gguf") && other.contains("one of model"), "{other}");
    let full = refused(demo_model(), standins, demo_model()).await;
    assert!(full.contains("demo.gguf") && full.contains("a full model"), "{full}");
    let half = |config: &mut EngineConfig, _: &Path| config.expert_cache = Budget::Fraction(0.5);
    let cache = refused(out.clone(), half, out.clone()).await;
    assert!(cache.contains("expert cache: found \"50%\", expected 100%"), "{cache}");

    let again = PackConfig {
        model: out.clone(),
        out: dir.path().join("again.gguf"),
        budget: Budget::Fraction(0.1),
        calibration: vec![TEXT.repeat(50)],
        tokens: 1024,
        threads: 1,
    };
    let error = pack(&again, |_, _, _| ()).await.expect_err("a pack of a pack").to_string();
    assert!(error.contains("found a pack"), "{error}");
    let short = PackConfig { model: demo_model(), calibration: vec![TEXT.to_owned()], ..again };
    let error = pack(&short, |_, _, _| ()).await.expect_err("too little text").to_string();
    assert!(error.contains("calibration") && error.contains("512"), "{error}");
    let none = PackConfig {
        calibration: vec![TEXT.repeat(50)],
        budget: Budget::Bytes(1000),
        ..short.clone()
    };
    let error = pack(&none, |_, _, _| ()).await.expect_err("no room").to_string();
    assert!(error.contains("1000 bytes") && error.contains("98304"), "{error}");
    let place = PackConfig { out: demo_model(), ..short };
    let error = pack(&place, |_, _, _| ()).await.expect_err("the model's place").to_string();
    assert!(error.contains("demo.gguf") && error.contains("another place"), "{error}");
}
