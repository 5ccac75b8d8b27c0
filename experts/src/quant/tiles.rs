//! The tile functions of an instruction set with vectors, from its dot products.

/// Defines a tile function for each float type from the calling module's dot products of a weight row with some
/// activation rows, `BATCH` of them at a time. One weight row at a time: two interleaved streams cost the hardware's
/// prefetch half of the bandwidth (measured on Zen 4).
macro_rules! float_tiles {
    ($features:literal) => {
        float_tiles!($features, f32_tile, F32);
        float_tiles!($features, f16_tile, F16);
        float_tiles!($features, bf16_tile, BF16);
    };
    ($features:literal, $name:ident, $kind:expr) => {
        /// # Safety
        /// See `TileFn`.
        #[target_feature(enable = $features)]
        unsafe fn $name(tile: &Tile<'_>) {
            let (batches, rest) = tile.x.as_chunks::<BATCH>();
            for (i, x) in batches.iter().enumerate() {
                for r in 0..tile.rows {
                    // SAFETY: `TileFn`'s conditions.
                    unsafe { tile.store(i * BATCH, r, float_dot::<$kind, BATCH>(tile.row(r), x)) };
                }
            }
            for (i, x) in rest.as_chunks::<1>().0.iter().enumerate() {
                for r in 0..tile.rows {
                    let i = batches.len() * BATCH + i;
                    // SAFETY: `TileFn`'s conditions.
                    unsafe { tile.store(i, r, float_dot::<$kind, 1>(tile.row(r), x)) };
                }
            }
        }
    };
}

pub(super) use float_tiles;
