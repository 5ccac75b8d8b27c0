use std::path::{Path, PathBuf};

use outrigger_experts::{ActFormat, Model};

use super::*;
use crate::request::ExpertRows;

/// A model, an engine on it, and requests for layer 1 in every form that it takes.
fn fixture(model: &str, threads: usize) -> (Engine, Vec<Vec<Work>>) {
    let path: PathBuf = Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(model);
    let model = Arc::new(Model::open(&path).unwrap());
    let config = ServerConfig { threads, ..ServerConfig::default() };
    let shard = Shard::new(model.clone(), &config).unwrap();
    let forms = shard.up.iter().filter(|form| **form != Encoding::F16);
    let requests = forms.map(|&form| (1..=5).map(|n| request(&model, form, n)).collect());
    (Engine::new(&shard, &config, Arc::new(Metrics::new())).unwrap(), requests.collect())
}

/// `n` rows, each with four experts; other `n`, other experts and weights.
fn request(model: &Model, form: Encoding, n: usize) -> Work {
    let (width, experts) = (model.spec.n_embd, model.spec.n_experts);
    let value = |i: usize| ((i * 37 + n * 101) % 199) as f32 / 100.0 - 1.0;
    let mut x = Activations::new(width);
    x.set(&(0..n * width).map(value).collect::<Vec<f32>>());
    let activations = match form {
        Encoding::Q80 => {
            x.quantize(ActFormat::Q8_0);
            Decoded::Q80 { scales: x.q8_0().0.to_vec(), quants: x.q8_0().1.to_vec() }
        }
        _ => Decoded::F32(x.f32().to_vec()),
    };
    let mut chosen: Vec<u16> = (0..4).map(|k| ((k * 5 + n) % experts) as u16).collect();
    chosen.sort_unstable();
    chosen.dedup();
    let rows = |expert: u16| {
        (0..n as u32).map(|row| (row, value(row as usize + expert as usize))).collect()
    };
    let groups = chosen.into_iter().map(|expert| ExpertRows { expert, rows: rows(expert) });
    let (groups, reply) = (groups.collect(), Encoding::F32);
    Work { layer: 1, rows: n, activations, groups, reply, device: 0, trace: None }
}

#[test]
fn a_batch_gives_each_request_the_bits_that_it_gets_alone() {
    for model in ["models/demo.gguf", "tests/fixtures/olmoe/model.gguf"] {
        for threads in [1, 2] {
            let (mut engine, forms) = fixture(model, threads);
            for requests in &forms {
                let together = engine.run(&requests.iter().collect::<Vec<_>>());
                for (request, together) in requests.iter().zip(together) {
                    let alone = engine.run(&[request]).remove(0).unwrap();
                    let together = together.unwrap();
                    assert_eq!(together.bytes, alone.bytes, "{model} {threads} threads");
                    assert!(alone.bytes.iter().any(|byte| *byte != 0));
                }
            }
        }
    }
}

#[test]
fn one_request_that_overflows_does_not_spoil_its_company() {
    let (mut engine, forms) = fixture("tests/fixtures/olmoe/model.gguf", 1);
    let requests = &forms[0];
    let mut bad = request_like(&requests[1]);
    if let Decoded::F32(values) = &mut bad.activations {
        values.iter_mut().for_each(|value| *value *= 1e30);
    }
    let mut answers = engine.run(&[&requests[0], &bad, &requests[2]]).into_iter();
    let mut next = || answers.next().unwrap();
    let (first, second, third) = (next().unwrap(), next().unwrap_err(), next().unwrap());
    assert_eq!(second.code(), tonic::Code::DataLoss);
    assert_eq!(first.bytes, engine.run(&[&requests[0]]).remove(0).unwrap().bytes);
    assert_eq!(third.bytes, engine.run(&[&requests[2]]).remove(0).unwrap().bytes);
}

fn request_like(work: &Work) -> Work {
    let groups = work.groups.iter();
    let groups = groups.map(|g| ExpertRows { expert: g.expert, rows: g.rows.clone() }).collect();
    Work { groups, activations: work.activations.clone(), trace: None, ..*work }
}
