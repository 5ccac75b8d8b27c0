//! The tile functions of an instruction set with vectors, from its dot products.

/// Defines a tile function for each weight type from the calling module's dot products of a weight row with some
/// activation rows, `BATCH` of them at a time. One weight row at a time: two interleaved streams cost the hardware's
/// prefetch half of the bandwidth (measured on Zen 4).
macro_rules! tile_functions {
    ($features:literal) => {
        tile_functions!($features, f32_tile, float_dot, F32);
        tile_functions!($features, f16_tile, float_dot, F16);
        tile_functions!($features, bf16_tile, float_dot, BF16);
        tile_functions!($features, q8_0_tile, block_dot, false);
        tile_functions!($features, q4_0_tile, block_dot, true);
        tile_functions!($features, q4_k_tile, k_dot, false);
        tile_functions!($features, q5_k_tile, k_dot, true);
        tile_functions!($features, q6_k_tile, q6_k_dot);
    };
    ($features:literal, $name:ident, $dot:ident $(, $kind:expr)?) => {
        /// # Safety
        /// See `TileFn`.
        #[target_feature(enable = $features)]
        unsafe fn $name(tile: &Tile<'_>) {
            let (batches, rest) = tile.x.as_chunks::<BATCH>();
            for (i, x) in batches.iter().enumerate() {
                for r in 0..tile.rows {
                    // SAFETY: `TileFn`'s conditions.
                    unsafe { tile.store(i * BATCH, r, $dot::<$({ $kind },)? BATCH>(tile.row(r), x)) };
                }
            }
            for (i, x) in rest.as_chunks::<1>().0.iter().enumerate() {
                for r in 0..tile.rows {
                    let i = batches.len() * BATCH + i;
                    // SAFETY: `TileFn`'s conditions.
                    unsafe { tile.store(i, r, $dot::<$({ $kind },)? 1>(tile.row(r), x)) };
                }
            }
        }
    };
}

pub(super) use tile_functions;
