use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;

/// The probability of every token that may be drawn, as llama.cpp's `llama-sampler.cpp` describes
/// the chain: sort, cut to k, softmax and cut to p, cut to min-p, divide by the temperature, softmax.
fn reference(logits: &[f32], config: &SamplerConfig) -> BTreeMap<u32, f64> {
    let mut kept: Vec<(u32, f64)> = Vec::new();
    for (id, &logit) in logits.iter().enumerate() {
        if logit.is_finite() {
            kept.push((id as u32, f64::from(logit)));
        }
    }
    kept.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
    if config.top_k > 0 {
        kept.truncate(config.top_k);
    }
    let mut cumulative = 0.0;
    let mut cut = Vec::new();
    for (token, p) in kept.iter().zip(softmax(&kept, 1.0)) {
        cut.push(*token);
        cumulative += p;
        if config.top_p < 1.0 && cumulative >= f64::from(config.top_p) {
            break;
        }
    }
    let probabilities = softmax(&cut, 1.0);
    let mut likely = Vec::new();
    for (token, p) in cut.iter().zip(&probabilities) {
        if *p >= f64::from(config.min_p) * probabilities[0] || likely.is_empty() {
            likely.push(*token);
        }
    }
    let probabilities = softmax(&likely, f64::from(config.temperature));
    likely.iter().map(|token| token.0).zip(probabilities).collect()
}

fn softmax(tokens: &[(u32, f64)], temperature: f64) -> Vec<f64> {
    let max = tokens.iter().map(|token| token.1).fold(f64::MIN, f64::max);
    let exp: Vec<f64> = tokens.iter().map(|token| ((token.1 - max) / temperature).exp()).collect();
    let sum: f64 = exp.iter().sum();
    exp.iter().map(|x| x / sum).collect()
}

fn ours(logits: &[f32], config: &SamplerConfig) -> BTreeMap<u32, f64> {
    let mut candidates = Vec::new();
    filter(logits, config, &mut candidates);
    let sum = total(&candidates);
    candidates.iter().map(|c| (c.id, c.weight / sum)).collect()
}

fn logits() -> impl Strategy<Value = Vec<f32>> {
    // A coarse grid, so that ties are common, and values that are no candidates.
    let logit = prop_oneof![
        8 => (-40i32..40).prop_map(|x| x as f32 / 4.0),
        1 => Just(f32::NAN),
        1 => Just(f32::NEG_INFINITY),
    ];
    prop::collection::vec(logit, 1..200)
        .prop_filter("something to choose", |logits| logits.iter().any(|x| x.is_finite()))
}

fn config() -> impl Strategy<Value = SamplerConfig> {
    // Odd fractions: none is reached exactly, where rounding could decide.
    let fraction =
        || prop_oneof![Just(0.0f32), (1u32..70).prop_map(|x| x as f32 / 70.7), Just(1.0)];
    (0usize..60, fraction(), fraction(), 1u32..40, any::<u64>()).prop_map(
        |(top_k, top_p, min_p, temperature, seed)| SamplerConfig {
            temperature: temperature as f32 / 10.0,
            top_k,
            top_p,
            min_p: min_p * 0.9,
            seed,
            ..SamplerConfig::default()
        },
    )
}

proptest! {
    #[test]
    fn the_distribution_is_the_references(logits in logits(), config in config()) {
        let (ours, expected) = (ours(&logits, &config), reference(&logits, &config));
        prop_assert_eq!(ours.keys().collect::<Vec<_>>(), expected.keys().collect::<Vec<_>>());
        for (id, p) in expected {
            prop_assert!((ours[&id] - p).abs() < 1e-9, "token {}: {} not {}", id, ours[&id], p);
        }
    }

    #[test]
    fn only_candidates_are_drawn_and_a_seed_repeats(logits in logits(), config in config()) {
        let candidates = reference(&logits, &config);
        let (mut one, mut other) = (Sampler::new(config.clone()), Sampler::new(config));
        for _ in 0..20 {
            let id = one.sample(&logits, &[]);
            prop_assert!(candidates.contains_key(&id));
            prop_assert_eq!(other.sample(&logits, &[]), id);
        }
    }

    #[test]
    fn any_logits_and_any_config_give_a_token(
        logits in prop::collection::vec(prop::num::f32::ANY, 1..50),
        (temperature, top_p, min_p) in
            (prop::num::f32::ANY, prop::num::f32::ANY, prop::num::f32::ANY),
        repeat_penalty in prop::num::f32::ANY,
        top_k in 0usize..60,
    ) {
        let config =
            SamplerConfig { temperature, top_k, top_p, min_p, repeat_penalty, ..Default::default() };
        let mut sampler = Sampler::new(config);
        for _ in 0..5 {
            prop_assert!((sampler.sample(&logits, &[7, 0]) as usize) < logits.len());
        }
    }
}

#[test]
fn draws_follow_the_distribution() {
    let logits = [1.0, 2.0, 0.0, 1.5, -3.0];
    let config = SamplerConfig { temperature: 1.3, seed: 7, ..SamplerConfig::default() };
    let expected = reference(&logits, &config);
    let mut sampler = Sampler::new(config);
    let mut counts = BTreeMap::<u32, f64>::new();
    const DRAWS: u32 = 100_000;
    for _ in 0..DRAWS {
        *counts.entry(sampler.sample(&logits, &[])).or_default() += 1.0 / f64::from(DRAWS);
    }
    for (id, p) in expected {
        // Five standard deviations of the share of a fair draw.
        let tolerance = 5.0 * (p * (1.0 - p) / f64::from(DRAWS)).sqrt();
        assert!((counts[&id] - p).abs() < tolerance, "token {id}: {} not {p}", counts[&id]);
    }
}

#[test]
fn greedy_takes_the_lowest_id_of_the_best() {
    let mut greedy = Sampler::new(SamplerConfig::greedy());
    assert_eq!(greedy.sample(&[0.0, 3.0, f32::NAN, 3.0], &[]), 1);
    assert_eq!(greedy.sample(&[f32::NAN, f32::NEG_INFINITY, -1e30], &[]), 2);
    assert_eq!(greedy.sample(&[f32::NAN; 4], &[]), 0);
    assert_eq!(greedy.sample(&[], &[]), 0);
}

#[test]
fn one_candidate_is_greedy_at_any_temperature() {
    let config = SamplerConfig { temperature: 5.0, top_k: 1, ..SamplerConfig::default() };
    let mut sampler = Sampler::new(config);
    assert!((0..100).all(|_| sampler.sample(&[0.5, 1.0, 1.0], &[]) == 1));
}

#[test]
fn a_penalty_counts_each_recent_token_once() {
    let config = SamplerConfig { repeat_penalty: 2.0, repeat_last_n: 2, ..SamplerConfig::greedy() };
    let mut sampler = Sampler::new(config);
    // Halved once, token 0 is still the best; halved twice, it would not be.
    assert_eq!(sampler.sample(&[4.0, 1.5, -1.2], &[0, 0]), 0);
    let logits = [1.6, 1.5, 1.2, -0.1];
    assert_eq!(sampler.sample(&logits, &[0]), 1);
    assert_eq!(sampler.sample(&logits, &[0, 1]), 2);
    assert_eq!(sampler.sample(&logits, &[0, 1, 2]), 0, "the first is not recent any more");
    assert_eq!(sampler.sample(&[-1.0, -1.5, -1.9], &[2, 0]), 1, "negative logits double");
}

#[test]
fn presence_is_taken_once_and_frequency_each_time() {
    let best = |presence_penalty, frequency_penalty, history: &[u32]| {
        let config =
            SamplerConfig { presence_penalty, frequency_penalty, ..SamplerConfig::greedy() };
        Sampler::new(config).sample(&[2.0, 1.0, 0.9], history)
    };
    assert_eq!(best(0.8, 0.0, &[0, 0, 0]), 0);
    assert_eq!(best(1.2, 0.0, &[0]), 1);
    assert_eq!(best(0.0, 0.4, &[0, 0]), 0);
    assert_eq!(best(0.0, 0.4, &[0, 0, 0]), 1);
    assert_eq!(best(-0.4, 0.0, &[1]), 0);
    assert_eq!(best(-1.2, 0.0, &[1]), 1, "a negative one favours");
}

#[test]
fn biases_are_added_before_penalties() {
    let config = |repeat_penalty| SamplerConfig {
        logit_bias: vec![(2, 3.0), (0, -100.0), (9, 1.0)],
        repeat_penalty,
        ..SamplerConfig::greedy()
    };
    let logits = [2.0, 1.0, -1.5];
    assert_eq!(Sampler::new(config(1.0)).sample(&logits, &[]), 2);
    assert_eq!(Sampler::new(config(2.0)).sample(&logits, &[2]), 1, "1.5 is halved, not doubled");
}

#[test]
fn parameters_out_of_range_are_named() {
    let default = SamplerConfig::default;
    assert_eq!(default().check(), Ok(()));
    let field = |config: SamplerConfig| config.check().unwrap_err().field;
    assert_eq!(field(SamplerConfig { temperature: -1.0, ..default() }), "temperature");
    assert_eq!(field(SamplerConfig { temperature: f32::INFINITY, ..default() }), "temperature");
    assert_eq!(field(SamplerConfig { top_p: f32::NAN, ..default() }), "top-p");
    assert_eq!(field(SamplerConfig { min_p: 1.5, ..default() }), "min-p");
    assert_eq!(field(SamplerConfig { repeat_penalty: 0.0, ..default() }), "repeat-penalty");
    let odd = f32::NAN;
    assert_eq!(field(SamplerConfig { presence_penalty: odd, ..default() }), "presence-penalty");
    assert_eq!(field(SamplerConfig { frequency_penalty: odd, ..default() }), "frequency-penalty");
    let logit_bias = vec![(0, 1.0), (1, odd)];
    assert_eq!(field(SamplerConfig { logit_bias, ..default() }), "logit-bias");
}

/// `ChaCha8Rng::seed_from_u64(42)`: the stream is part of what a seed promises.
#[test]
fn the_stream_of_a_seed_is_fixed() {
    let mut rng = ChaCha8Rng::seed_from_u64(42);
    let first = unit(&mut rng);
    assert!((0.0..1.0).contains(&first));
    let logits = [0.0; 16];
    let config = SamplerConfig { min_p: 0.0, top_p: 1.0, seed: 42, ..SamplerConfig::default() };
    assert_eq!(Sampler::new(config).sample(&logits, &[]), (first * 16.0) as u32);
}
