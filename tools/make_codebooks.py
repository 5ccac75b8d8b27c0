"""Makes the codebooks of the vector-quantised weight types: `experts/src/quant/codebooks.bin`.

    python tools/make_codebooks.py --out experts/src/quant/codebooks.bin

For each dimension, 256 vectors that are a good quantiser of independent Gaussians (Lloyd's algorithm, fixed seed), in
8-bit integers: rows of a trained matrix, scaled to variance 1, are close to that, and codebooks learned from a model's
own weights were no better. The file holds the codebooks one after another, dimensions ascending, vectors as rows; 32
integer steps are 1.
"""

import argparse
from pathlib import Path

import numpy as np

DIMS = [2, 3, 4, 6, 8, 12, 16, 24]
SIZE = 256
STEPS = 32


def nearest(points, book):
    half_norms = (book * book).sum(1) / 2
    return np.concatenate([(part @ book.T - half_norms).argmax(1) for part in np.array_split(points, 16)])


def lloyd(dim, rng, points=120_000, rounds=80):
    points = rng.standard_normal((points, dim)).astype(np.float32)
    book = points[:SIZE].copy()
    for _ in range(rounds):
        at = nearest(points, book)
        sums, counts = np.zeros((SIZE, dim)), np.bincount(at, minlength=SIZE)
        np.add.at(sums, at, points)
        spare = points[rng.integers(0, len(points), SIZE)]
        book = np.where(counts[:, None] > 0, sums / np.maximum(counts, 1)[:, None], spare).astype(np.float32)
    return book


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    rng = np.random.default_rng(1)
    fresh = np.random.default_rng(2)
    with args.out.open("wb") as file:
        for dim in DIMS:
            book = np.clip(np.round(lloyd(dim, rng) * STEPS), -127, 127).astype(np.int8)
            file.write(book.tobytes())
            test = fresh.standard_normal((50_000, dim)).astype(np.float32)
            error = test - book[nearest(test, book / np.float32(STEPS))] / np.float32(STEPS)
            print(f"{dim:3} weights a code: {8 / dim:.2f} bits a weight, mean squared error {(error**2).mean():.4f}")


if __name__ == "__main__":
    main()
