//! Answers are those of the same computation at home, bit by bit.

mod common;

use common::*;
use outrigger_experts::{GgmlType, Model};
use outrigger_proto::encoding::encode_f16;
use outrigger_proto::v1::{DescribeRequest, Encoding, Held};
use outrigger_server::{Compute, ServerConfig};

#[tokio::test(flavor = "multi_thread")]
async fn describe_tells_the_model_and_the_part() {
    let config =
        ServerConfig { layers: Some(1..=4), experts: Some(8..=15), max_rows: 9, ..config(&demo()) };
    let mut server = start(config).await;
    let model = Model::open(&demo()).unwrap();
    let answer = server.client.describe(DescribeRequest {}).await.unwrap().into_inner();
    assert_eq!(answer.fingerprint[..], model.gguf.fingerprint().as_bytes()[..]);
    assert_eq!(answer.model, "Outrigger demo 21M");
    assert_eq!((answer.layers, answer.experts, answer.width), (6, 32, 256));
    let held = Held { first_layer: 1, last_layer: 4, first_expert: 8, last_expert: 15 };
    assert_eq!(answer.held, [held]);
    let up: Vec<_> = answer.up().collect();
    assert_eq!(up, [Encoding::Q80, Encoding::F32, Encoding::F16]);
    let down: Vec<_> = answer.down().collect();
    assert_eq!(down, [Encoding::F48, Encoding::F32, Encoding::F16]);
    let limits = answer.limits.unwrap();
    assert_eq!(limits.max_rows, 9);
    assert!(limits.max_message_bytes >= 9 * 256 * 4);
}

#[tokio::test(flavor = "multi_thread")]
async fn answers_equal_the_local_computation() {
    let directory = tempfile::tempdir().unwrap();
    let q4_k = directory.path().join("q4_k.gguf");
    write_model(&q4_k, GgmlType::Q4_K);
    for (path, native) in [(demo(), Encoding::Q80), (q4_k, Encoding::Q8K), (olmoe(), Encoding::F32)]
    {
        let model = Model::open(&path).unwrap();
        for compute in [Compute::Thread, Compute::Inline] {
            let mut server = start(ServerConfig { compute, ..config(&path) }).await;
            for (seed, rows) in [1, 2, 33].into_iter().enumerate() {
                let layer = model.spec.n_layers as u32 - 1;
                let job = Job::random(&model, layer, rows, 2, seed as u64);
                let expected = job.local(&model, |_| true);
                // Blocks that the kernels make anyway lose nothing, and neither do plain values.
                for encoding in [native, Encoding::F32] {
                    let request = job.request(&model, encoding);
                    let answer = server.client.forward(request).await.unwrap().into_inner();
                    assert_eq!((answer.request_id, answer.layer), (7, layer));
                    assert_eq!(answer.rows as usize, rows);
                    assert_eq!(answer.encoding(), Encoding::F32);
                    assert!(answer.not_run.is_empty());
                    assert_eq!(sums(&model, &answer), expected, "{path:?} {encoding:?}");
                }
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn halves_are_the_sums_rounded() {
    let model = Model::open(&olmoe()).unwrap();
    let mut server = start(config(&olmoe())).await;
    let mut job = Job::random(&model, 0, 3, 4, 5);
    // Values that an f16 holds go up without loss.
    job.values.iter_mut().for_each(|value| *value = (*value * 512.0).round() / 512.0);
    let mut request = job.request(&model, Encoding::F16);
    request.reply = Encoding::F16.into();
    let answer = server.client.forward(request.clone()).await.unwrap().into_inner();
    assert_eq!(answer.encoding(), Encoding::F16);
    assert_eq!(Some(answer.sums), encode_f16(&job.local(&model, |_| true)));

    // A sum of more than 65504 comes as f32.
    request.groups.iter_mut().for_each(|g| g.weights.iter_mut().for_each(|w| *w = 1e12));
    let answer = server.client.forward(request).await.unwrap().into_inner();
    assert_eq!(answer.encoding(), Encoding::F32);
    assert!(sums(&model, &answer).iter().any(|sum| sum.abs() > 65504.0));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_not_held_is_named_and_the_rest_runs() {
    let model = Model::open(&demo()).unwrap();
    let held = 10..=19;
    let mut server = start(ServerConfig { experts: Some(held.clone()), ..config(&demo()) }).await;
    let job = Job::random(&model, 2, 16, 4, 3);
    let answer = server.client.forward(job.request(&model, Encoding::Q80)).await.unwrap();
    let answer = answer.into_inner();
    let missing: Vec<u32> = job.groups.iter().map(|g| g.0).filter(|e| !held.contains(e)).collect();
    assert!(!missing.is_empty() && missing.len() < job.groups.len());
    assert_eq!(answer.not_run, missing);
    assert_eq!(sums(&model, &answer), job.local(&model, |e| held.contains(&e)));
}

#[tokio::test(flavor = "multi_thread")]
async fn rows_of_no_group_are_zero() {
    let model = Model::open(&demo()).unwrap();
    let mut server = start(config(&demo())).await;
    let mut job = Job::random(&model, 0, 3, 2, 9);
    job.groups = vec![(5, vec![(1, 0.5)])];
    let answer = server.client.forward(job.request(&model, Encoding::Q80)).await.unwrap();
    let sums = sums(&model, &answer.into_inner());
    assert_eq!(sums, job.local(&model, |_| true));
    assert!(sums[..256].iter().chain(&sums[512..]).all(|sum| *sum == 0.0));
    assert!(sums[256..512].iter().any(|sum| *sum != 0.0));

    job.groups.clear();
    let answer = server.client.forward(job.request(&model, Encoding::Q80)).await.unwrap();
    assert!(answer.into_inner().sums.iter().all(|byte| *byte == 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn company_changes_nothing() {
    let model = Model::open(&demo()).unwrap();
    // All at once: a client that has not heard of the limit yet would go beyond it, and be refused.
    let server = start(ServerConfig { max_streams: 256, ..config(&demo()) }).await;
    let jobs: Vec<Job> =
        (0..96).map(|i| Job::random(&model, i % 3, 1 + i as usize % 5, 4, u64::from(i))).collect();
    let mut calls = tokio::task::JoinSet::new();
    for (i, job) in jobs.iter().enumerate() {
        let encoding = if i % 2 == 0 { Encoding::Q80 } else { Encoding::F32 };
        let (request, mut client) = (job.request(&model, encoding), server.client.clone());
        calls.spawn(async move { (i, client.forward(request).await.unwrap().into_inner()) });
    }
    while let Some(answered) = calls.join_next().await {
        let (i, answer) = answered.unwrap();
        assert_eq!(sums(&model, &answer), jobs[i].local(&model, |_| true), "request {i}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_small_expert_cache_gives_the_same_answers() {
    let model = Model::open(&demo()).unwrap();
    let expert_cache = "10%".parse().unwrap();
    let mut server = start(ServerConfig { expert_cache, ..config(&demo()) }).await;
    for seed in 0..8 {
        let job = Job::random(&model, 4, 4, 4, seed);
        let answer = server.client.forward(job.request(&model, Encoding::Q80)).await.unwrap();
        assert_eq!(sums(&model, &answer.into_inner()), job.local(&model, |_| true));
    }
}
