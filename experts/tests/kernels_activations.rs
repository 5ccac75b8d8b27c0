//! Activation blocks against ggml's reference arithmetic, written out value by value.

use outrigger_experts::{ActFormat, Activations};

fn noise(n: usize) -> Vec<f32> {
    let mut state = 9u32;
    let next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        ((state >> 8) as f32 / (1 << 23) as f32 - 1.0) * (1 << (state >> 29)) as f32
    };
    std::iter::repeat_with(next).take(n).collect()
}

fn made(values: &[f32], cols: usize) -> Activations {
    let mut x = Activations::new(cols);
    x.set(values);
    x.quantize(ActFormat::Q8_0);
    x.quantize(ActFormat::Q8_K);
    x
}

fn greatest(block: &[f32]) -> f32 {
    block.iter().fold(0.0, |most, v| v.abs().max(most))
}

#[test]
fn q8_0_blocks_are_ggmls() {
    let values = noise(3 * 512);
    let x = made(&values, 512);
    let (d, q) = x.q8_0();
    for (b, block) in values.chunks(32).enumerate() {
        let scale = greatest(block) / 127.0;
        assert_eq!(d[b], half::f16::from_f32(scale).to_f32());
        for (q, v) in q[32 * b..].iter().zip(block) {
            assert_eq!(i32::from(*q), (v * (1.0 / scale)).round_ties_even() as i32);
        }
    }
}

#[test]
fn q8_k_blocks_are_ggmls_up_to_sign() {
    let values = noise(3 * 512);
    let x = made(&values, 512);
    let (d, q) = x.q8_k();
    for (b, block) in values.chunks(256).enumerate() {
        let inverse = 127.0 / greatest(block);
        assert_eq!(d[b], 1.0 / inverse);
        for (q, v) in q[256 * b..].iter().zip(block) {
            assert_eq!(i32::from(*q), (v * inverse).round_ties_even() as i32);
        }
    }
}

#[test]
fn zeros_and_the_next_to_zero_have_no_scale() {
    for value in [0.0, -0.0, 1e-44, f32::MIN_POSITIVE / 8.0] {
        let x = made(&[value; 256], 256);
        assert_eq!(x.q8_k(), (&[0.0][..], &[0i8; 256][..]), "{value}");
        assert_eq!(x.q8_0(), (&[0.0; 8][..], &[0i8; 256][..]), "{value}");
    }
}

#[test]
fn what_is_not_a_number_shows_in_its_block_only() {
    for bad in [f32::NAN, -f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let mut values = vec![1.0; 512];
        values[300] = bad;
        let x = made(&values, 512);
        assert_eq!(x.q8_k().0.iter().map(|d| d.is_nan()).collect::<Vec<_>>(), [false, true]);
        let bad_blocks: Vec<usize> = (0..16).filter(|b| x.q8_0().0[*b].is_nan()).collect();
        assert_eq!(bad_blocks, [300 / 32]);
    }
}

#[test]
fn blocks_from_the_wire_are_taken_as_they_are_and_stand_for_values() {
    let q: Vec<i8> = (0..512).map(|i| (i as u8) as i8).collect();
    let mut x = Activations::new(256);
    x.set_q8_k(2, &[0.5, 0.25], &q);
    assert_eq!((x.rows(), x.q8_k()), (2, (&[0.5, 0.25][..], &q[..])));
    x.quantize(ActFormat::F32);
    assert_eq!((x.f32()[127], x.f32()[128], x.f32()[256 + 129]), (63.5, -64.0, -31.75));
}
