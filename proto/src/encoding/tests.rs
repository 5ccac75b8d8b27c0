use proptest::prelude::*;

use super::*;

const ALL: [Encoding; 5] =
    [Encoding::F32, Encoding::F16, Encoding::F48, Encoding::Q80, Encoding::Q8K];

#[test]
fn layouts_are_scales_then_quants_little_endian() {
    assert_eq!(encode_f32(&[1.0, -2.5])[..], [0, 0, 0x80, 0x3f, 0, 0, 0x20, 0xc0]);
    assert_eq!(encode_f16(&[1.0, -2.5]).unwrap()[..], [0, 0x3c, 0, 0xc1]);

    let quants: Vec<i8> = (-32..32).collect();
    let packed = encode_q8_0(&[0.5, 2.0], &quants);
    assert_eq!(packed[..4], [0, 0x38, 0, 0x40]);
    assert_eq!(packed[4..6], [0xe0, 0xe1]);
    assert_eq!(packed.len(), 4 + 64);

    let quants = [-1i8; 256];
    let packed = encode_q8_k(&[1.0], &quants);
    assert_eq!(packed[..5], [0, 0, 0x80, 0x3f, 0xff]);
    assert_eq!(packed.len(), 4 + 256);
}

#[test]
fn sizes_are_those_of_the_format() {
    assert_eq!(Encoding::F32.bytes(3, 5), Some(60));
    assert_eq!(Encoding::F16.bytes(3, 5), Some(30));
    assert_eq!(Encoding::F48.bytes(3, 5), Some(90));
    assert_eq!(Encoding::Q80.bytes(2, 64), Some(2 * 64 + 2 * 2 * 2));
    assert_eq!(Encoding::Q8K.bytes(2, 512), Some(2 * 512 + 2 * 2 * 4));
    assert_eq!(Encoding::Q80.bytes(2, 48), None);
    assert_eq!(Encoding::Q8K.bytes(2, 128), None);
    assert_eq!(Encoding::Unspecified.bytes(1, 256), None);
}

#[test]
fn sizes_that_overflow_are_refused() {
    for encoding in ALL {
        for (rows, cols) in [(usize::MAX, 256), (usize::MAX / 256, 512), (1 << 62, 4)] {
            assert_eq!(encoding.bytes(rows, cols), None, "{encoding:?} {rows} x {cols}");
            let refused = decode(encoding, rows, cols, &[0; 8]);
            assert_eq!(refused, Err(EncodingError::Shape { encoding, rows, cols }));
        }
    }
}

#[test]
fn an_f16_that_overflows_is_not_sent() {
    assert_eq!(encode_f16(&[0.0, 65504.0]).map(|b| b.len()), Some(4));
    assert_eq!(encode_f16(&[0.0, 70000.0]), None);
    assert_eq!(encode_f16(&[f32::NAN]), None);
}

#[test]
fn errors_say_what_was_found_and_expected() {
    let error = decode(Encoding::Q80, 2, 64, &[0; 7]).unwrap_err();
    assert_eq!(error.to_string(), "7 bytes, expected 136 for 2 x 64 values as ENCODING_Q8_0");
    let error = decode(Encoding::Q8K, 2, 64, &[0; 7]).unwrap_err();
    assert_eq!(error.to_string(), "2 x 64 values do not fit encoding ENCODING_Q8_K");
    let mut bytes = encode_f32(&[1.0; 8]).to_vec();
    bytes[20..24].copy_from_slice(&f32::INFINITY.to_le_bytes());
    let error = decode(Encoding::F32, 2, 4, &bytes).unwrap_err();
    assert_eq!(error.to_string(), "value 5 is not finite");
}

/// A finite f32 that an f16 holds exactly.
fn half() -> impl Strategy<Value = f32> {
    any::<u16>()
        .prop_map(|bits| f16::from_bits(bits).to_f32())
        .prop_filter("finite", |v| v.is_finite())
}

fn finite_f32() -> impl Strategy<Value = f32> {
    any::<u32>().prop_map(f32::from_bits).prop_filter("finite", |v| v.is_finite())
}

/// Scales and quants of `rows` x `blocks` blocks of `block`.
fn blocks(
    scale: impl Strategy<Value = f32> + Clone,
    block: usize,
) -> impl Strategy<Value = (usize, usize, Vec<f32>, Vec<i8>)> {
    (1..4usize, 1..4usize).prop_flat_map(move |(rows, blocks)| {
        let n = rows * blocks;
        (
            Just(rows),
            Just(blocks * block),
            prop::collection::vec(scale.clone(), n),
            prop::collection::vec(any::<i8>(), n * block),
        )
    })
}

/// Sums, which [`decode`] does not take, are rounded.
fn decode_any(
    encoding: Encoding,
    rows: usize,
    cols: usize,
    bytes: &[u8],
) -> Result<Decoded, EncodingError> {
    if encoding != Encoding::F48 {
        return decode(encoding, rows, cols, bytes);
    }
    let sums = decode_sums(encoding, rows, cols, bytes)?;
    Ok(Decoded::F32(sums.into_iter().map(|v| v as f32).collect()))
}

proptest! {
    #[test]
    fn f32_round_trips(values in prop::collection::vec(finite_f32(), 1..200)) {
        let decoded = decode(Encoding::F32, 1, values.len(), &encode_f32(&values));
        prop_assert_eq!(decoded, Ok(Decoded::F32(values)));
    }

    #[test]
    fn f16_round_trips(values in prop::collection::vec(half(), 1..200)) {
        let decoded = decode(Encoding::F16, values.len(), 1, &encode_f16(&values).unwrap());
        prop_assert_eq!(decoded, Ok(Decoded::F32(values)));
    }

    #[test]
    fn f48_keeps_37_digits_of_a_double(values in prop::collection::vec(-1e30_f64..1e30, 1..200)) {
        let decoded = decode_sums(Encoding::F48, 1, values.len(), &encode_f48(&values)).unwrap();
        for (&value, got) in values.iter().zip(decoded) {
            prop_assert!((got - value).abs() <= value.abs() / f64::from(2_u32).powi(37));
        }
    }

    #[test]
    fn q8_0_round_trips((rows, cols, scales, quants) in blocks(half().boxed(), Q8_0_BLOCK)) {
        let decoded = decode(Encoding::Q80, rows, cols, &encode_q8_0(&scales, &quants));
        prop_assert_eq!(decoded, Ok(Decoded::Q80 { scales, quants }));
    }

    #[test]
    fn q8_k_round_trips((rows, cols, scales, quants) in blocks(finite_f32().boxed(), Q8_K_BLOCK)) {
        let decoded = decode(Encoding::Q8K, rows, cols, &encode_q8_k(&scales, &quants));
        prop_assert_eq!(decoded, Ok(Decoded::Q8K { scales, quants }));
    }

    /// Whatever the bytes and the claimed shape: an error, or that shape of finite numbers.
    #[test]
    fn nothing_bad_gets_through(
        which in 0..ALL.len(),
        rows in 0..6usize,
        cols in prop_oneof![0..600usize, Just(32), Just(256), Just(512)],
        bytes in prop::collection::vec(any::<u8>(), 0..1200),
    ) {
        let encoding = ALL[which];
        match decode_any(encoding, rows, cols, &bytes) {
            Ok(Decoded::F32(values)) => {
                prop_assert_eq!(values.len(), rows * cols);
                prop_assert!(values.iter().all(|v| v.is_finite()));
            }
            Ok(Decoded::Q80 { scales, quants } | Decoded::Q8K { scales, quants }) => {
                prop_assert_eq!(quants.len(), rows * cols);
                prop_assert!(scales.iter().all(|v| v.is_finite()));
            }
            Err(EncodingError::Size { expected, .. }) => prop_assert_ne!(expected, bytes.len()),
            Err(EncodingError::Shape { .. }) => {
                let block = if encoding == Encoding::Q80 { 32 } else { 256 };
                prop_assert_ne!(cols % block, 0);
            }
            Err(EncodingError::NotFinite { .. }) => {}
        }
    }

    /// One byte too many or too few is refused, and so is one number that is not finite.
    #[test]
    fn one_wrong_byte_or_number_is_refused(
        which in 0..ALL.len(),
        rows in 1..4usize,
        at in any::<prop::sample::Index>(),
    ) {
        let encoding = ALL[which];
        let mut bytes = vec![0u8; encoding.bytes(rows, 256).unwrap()];
        prop_assert!(decode_any(encoding, rows, 256, &bytes).is_ok());
        for len in [bytes.len() - 1, bytes.len() + 1] {
            let mut wrong = bytes.clone();
            wrong.resize(len, 0);
            let decoded = decode_any(encoding, rows, 256, &wrong);
            let refused = matches!(decoded, Err(EncodingError::Size { .. }));
            prop_assert!(refused);
        }
        let (nan, infinity) = (f32::NAN.to_le_bytes(), f16::NEG_INFINITY.to_le_bytes());
        let (what, floats, bad): (_, _, &[u8]) = match encoding {
            Encoding::F32 => ("value", rows * 256, &nan),
            Encoding::F16 => ("value", rows * 256, &infinity),
            Encoding::F48 => ("value", rows * 256, &f64::NAN.to_le_bytes()[2..]),
            Encoding::Q80 => ("scale", rows * 8, &infinity),
            _ => ("scale", rows, &nan),
        };
        let index = at.index(floats);
        bytes[index * bad.len()..][..bad.len()].copy_from_slice(bad);
        let decoded = decode_any(encoding, rows, 256, &bytes);
        prop_assert_eq!(decoded, Err(EncodingError::NotFinite { what, index }));
    }
}
