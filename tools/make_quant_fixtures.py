"""Makes tests/fixtures/quant: blocks of every weight type that we read, and the values that gguf-py gives them.

For each type, `q4_k.bin` holds 2048 values (8 super-blocks of the K types) as GGUF stores them and `q4_k.f32` the
little-endian f32 that they stand for. gguf-py's dequantisation is a numpy port that shares no code with us. Types that
gguf-py can quantise start from random normals, the others from random bytes, which reach every bit of every field; the
scales of the last blocks are then negative, subnormal and close to the f16 limit, which real files seldom show.

    python tools/make_quant_fixtures.py --out tests/fixtures/quant
"""

import argparse
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type

N_VALUES = 2048
# Scales of the last super-blocks: negative, f16 subnormal, near the largest f16, zero.
EXTREME_SCALES = np.array([-0.037, 3e-7, 60000.0, 0.0], dtype=np.float16)
# Byte offsets of the f16 scales (and minimum) inside one block.
SCALE_OFFSETS = {Type.Q8_0: [0], Type.Q4_0: [0], Type.Q4_K: [0, 2], Type.Q5_K: [0, 2], Type.Q6_K: [208]}


def blocks(ty, rng):
    """[blocks, bytes a block] of valid, finite blocks."""
    per_block, block_bytes = gguf.GGML_QUANT_SIZES[ty]
    values = rng.standard_normal(N_VALUES).astype(np.float32)
    if ty in (Type.F16, Type.BF16):
        values[:8] = [0.0, -0.0, 65504.0, -65504.0, 6e-8, -6e-8, 6.1e-5, 1.0]
    try:
        data = gguf.quants.quantize(values, ty).view(np.uint8).reshape(-1, block_bytes).copy()
    except NotImplementedError:
        data = rng.integers(0, 256, (N_VALUES // per_block, block_bytes), dtype=np.uint8)
        for offset in SCALE_OFFSETS[ty]:
            set_scales(data, offset, rng.uniform(0.0005, 0.01, len(data)).astype(np.float16))
    for offset in SCALE_OFFSETS.get(ty, []):
        set_scales(data[-len(EXTREME_SCALES) :], offset, EXTREME_SCALES)
    return data


def set_scales(data, offset, scales):
    data[:, offset : offset + 2] = scales.astype("<f2").view(np.uint8).reshape(-1, 2)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="directory of the fixtures")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for ty in [Type.Q8_0, Type.Q4_0, Type.Q4_K, Type.Q5_K, Type.Q6_K, Type.BF16, Type.F16]:
        data = blocks(ty, rng)
        values = gguf.quants.dequantize(data, ty).astype("<f4").ravel()
        assert values.size == N_VALUES and np.isfinite(values).all(), ty
        data.tofile(args.out / f"{ty.name.lower()}.bin")
        values.tofile(args.out / f"{ty.name.lower()}.f32")
        print(f"{ty.name}: {data.nbytes} bytes, {values.min():.4g} to {values.max():.4g}")


if __name__ == "__main__":
    main()
