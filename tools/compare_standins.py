"""Compares what can stand in for an expert at equal bytes, and what each part of the way `outrigger pack` codes gains.

    python tools/compare_standins.py --model models/demo.gguf --calibrate client/src/cli/calibration.txt \
        --texts val-prose.txt val-tales.txt val-code.txt val-romance.txt --csv docs/degradation-standins.csv

A second implementation, in numpy, of a Qwen3-MoE and of every stand-in. The server is gone and nothing is resident, so
that every call of every expert is stood in for. Bytes are a share of what the experts take in Q8_0. Everything that is
fitted is fitted to the same calibration text, and to the same squared error of the experts' weighted outputs. Prints a
Markdown table of perplexity ratio (geometric mean over texts) and acceptance; the CSV file has every figure.
"""

import argparse
import csv
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from numpy_moe import Model, compare, feed_forward, silu

CODEBOOKS = Path(__file__).parent.parent / "experts/src/quant/codebooks.bin"
WINDOW, BLOCK = 512, 32
# Weights a code, what widens a row's scale, and a code's error on Gaussians: as experts/src has them.
DIMS = (2, 3, 4, 6, 8, 12, 16, 24)
WIDENING = dict(zip(DIMS, (1.05, 1.1, 1.1, 1.15, 1.17, 1.22, 1.25, 1.3)))
DISTORTION = dict(zip(DIMS, (0.0083, 0.0427, 0.0983, 0.2188, 0.324, 0.4782, 0.5824, 0.7022)))
STEPS = {"nearest": "nearest", "layer": "feedback by the layer's inputs", "own": "feedback by the expert's own",
         "refit": "the same, output refitted"}  # fmt: skip
MEASURED, COMPARED = (3, 12), (24, 12, 6, 3, 2)
PACKS = (0.1, 0.2, 0.35, 0.5)


def unit(moments):
    return moments / np.trace(moments)


@dataclass
class Expert:
    """An expert with the rows that it saw, `x`, and their routed weights, `w`, [rows, 1]."""

    gate: np.ndarray
    up: np.ndarray
    down: np.ndarray
    x: np.ndarray
    w: np.ndarray
    layer: np.ndarray  # the second moments of all inputs of the layer, of trace 1
    energy: float  # of the residual stream behind the layer

    def __post_init__(self):
        self.own = unit((self.x * self.w).T @ (self.x * self.w)) + 0.1 * self.layer
        self.hidden = self.hide(self.gate, self.up)
        self.output = self.hidden @ self.down.T

    def hide(self, gate, up):
        return self.w * silu(self.x @ gate.T) * (self.x @ up.T)

    def error(self, hidden, down):
        return ((hidden @ down.T - self.output) ** 2).sum() / self.energy

    def refit(self, hidden):
        """The output matrix that makes the most of approximate hidden values: ridge regression towards the old one."""
        read = hidden.T @ hidden
        damped = read + 0.1 * np.trace(read) / len(read) * np.eye(len(read))
        return self.down + np.linalg.solve(damped, hidden.T @ (self.output - hidden @ self.down.T)).T


def mean_output(expert):
    """The output that is nearest to all of them, and its error."""
    mean = (expert.w * expert.output).sum(0) / (expert.w**2).sum()
    return mean, ((expert.w * mean - expert.output) ** 2).sum() / expert.energy


def affine_map(expert, rank):
    """Reduced-rank regression of the outputs on the inputs (Izenman 1975), its factors in int8."""
    share = expert.w**2 / (expert.w**2).sum()
    centre, mean = (share * expert.x).sum(0), mean_output(expert)[0]
    x, y = expert.w * (expert.x - centre), expert.output - expert.w * mean
    read = x.T @ x
    full = np.linalg.solve(read + 0.01 * np.trace(read) / len(read) * np.eye(len(read)), x.T @ y)
    top = np.linalg.eigh(full.T @ read @ full)[1][:, -rank:]
    into, out = int8_columns(full @ top), int8_columns(top)
    bias = mean - centre @ into @ out.T
    return lambda x: x @ into @ out.T + bias


def int8_columns(matrix):
    scale = np.abs(matrix).max(0) / 127
    return (np.round(matrix / scale) * scale).astype(np.float32)


def blocks(matrix, bits):
    """Round to nearest in blocks of 32 with a scale and a minimum in f16."""
    parts = matrix.reshape(-1, BLOCK)
    least = parts.min(1, keepdims=True).astype(np.float16).astype(np.float32)
    step = ((parts.max(1, keepdims=True) - least) / (2**bits - 1)).astype(np.float16).astype(np.float32)
    codes = np.clip(np.round((parts - least) / step), 0, 2**bits - 1)
    return (codes * step + least).reshape(matrix.shape)


def in_blocks(expert, bits):
    return feed_forward(*(blocks(matrix, bits) for matrix in (expert.gate, expert.up, expert.down)))


def read_codebooks():
    values = np.fromfile(CODEBOOKS, np.int8).astype(np.float32) / 32
    starts = np.cumsum([0, *(256 * dim for dim in DIMS)])
    return {dim: values[start:][: 256 * dim].reshape(256, dim) for dim, start in zip(DIMS, starts)}


def vector_codes(matrix, book, moments=None):
    """The rows' nearest vectors times the row's scale. With `moments`, the second moments of what the matrix reads,
    errors are fed back: LDLQ (Chee et al., arXiv 2307.13304), a vector at a time, from the last column to the first."""
    n, dim = matrix.shape[1], book.shape[1]
    widening = 1.0 if moments is None else WIDENING[dim]
    scale = (widening * np.sqrt((matrix**2).mean(1, keepdims=True))).astype(np.float16).astype(np.float32)
    if moments is not None:
        damped = moments + 0.01 * np.trace(moments) / n * np.eye(n)
        factor = np.linalg.cholesky(damped).astype(np.float32)
    out, carried = np.zeros_like(matrix), np.zeros_like(matrix)
    for start in reversed(range(0, n, dim)):
        here = slice(start, min(start + dim, n))
        target, vectors = matrix[:, here], book[:, : here.stop - start]
        if moments is not None:
            target = target + np.linalg.solve(factor[here, here].T, carried[:, here].T).T
        nearest = (target / scale @ vectors.T - (vectors**2).sum(1) / 2).argmax(1)
        out[:, here] = scale * vectors[nearest]
        if moments is not None:
            carried[:, :start] += (matrix[:, here] - out[:, here]) @ factor[here, :start]
    return out


class Coder:
    """Vector-quantised copies of experts, as good as each step of the way makes them."""

    def __init__(self, books):
        self.books = books

    def inputs(self, expert, dim, moments):
        both = np.vstack([expert.gate, expert.up])
        return (both if dim is None else vector_codes(both, self.books[dim], moments)).reshape(2, *expert.gate.shape)

    def output(self, expert, dim, hidden, matrix):
        return matrix if dim is None else vector_codes(matrix, self.books[dim], hidden.T @ hidden)

    def copy(self, expert, inputs, output, step="refit"):
        if step == "nearest":
            down = vector_codes(expert.down, self.books[output])
            return feed_forward(*self.inputs(expert, inputs, None), down)
        gate, up = self.inputs(expert, inputs, expert.layer if step == "layer" else expert.own)
        hidden = expert.hide(gate, up)
        matrix = expert.refit(hidden) if step == "refit" and output else expert.down
        return feed_forward(gate, up, self.output(expert, output, hidden, matrix))

    def as_chosen(self, expert, choice):
        if choice:
            return self.copy(expert, *choice)
        mean, _ = mean_output(expert)
        return lambda x: mean

    def curve(self, expert):
        """Distortion of coded inputs and of a coded output, each alone, at two codes; between them and beyond it is a
        power of the codebooks' own distortion."""
        measured = []
        for dim in MEASURED:
            hidden = expert.hide(*self.inputs(expert, dim, expert.own))
            down = self.output(expert, dim, expert.hidden, expert.down)
            measured.append([expert.error(hidden, expert.refit(hidden)), expert.error(expert.hidden, down)])
        (a, b), known = np.log(measured), np.log([DISTORTION[dim] for dim in MEASURED])
        slope = np.maximum((b - a) / (known[1] - known[0]), 0)
        return np.exp(a[:, None] + slope[:, None] * (np.log(list(DISTORTION.values())) - known[0]))


def code_bytes(shape, dim):
    rows, columns = shape
    return rows * (columns // BLOCK * 34 if dim is None else 2 + -(-columns // dim))


def copy_bytes(expert, inputs, output):
    return 2 * code_bytes(expert.gate.shape, inputs) + code_bytes(expert.down.shape, output)


def allocate(experts, curves, budget):
    """For each expert (weights a code of inputs, of the output) or None, the mean output: the least distortion plus
    price times bytes, at the least price that keeps to the budget (Shoham and Gersho 1988)."""
    one = next(iter(experts.values()))
    coded = [(i, o) for i in (None, *DIMS) for o in (None, *DIMS)]
    choices, cost = [None, *coded], np.array([2 * len(one.down), *(copy_bytes(one, *choice) for choice in coded)])
    padded = {key: np.pad(curve, ((0, 0), (1, 0))) for key, curve in curves.items()}
    distortion = np.array(
        [[mean_output(e)[1], *(padded[key][0][:, None] + padded[key][1]).ravel()] for key, e in experts.items()]
    )
    low, high = -100.0, 20.0
    for _ in range(60):
        price = (low + high) / 2
        best = (distortion + np.exp(price) * cost).argmin(1)
        low, high = (price, high) if cost[best].sum() > budget else (low, price)
    best = (distortion + np.exp(high) * cost).argmin(1)
    return {key: choices[at] for key, at in zip(experts, best)}, cost[best].sum()


def see(model, text, count):
    """Every expert with what it saw of `count` windows from all over the text."""
    parts = [text[len(text) * i // count :][: 10 * WINDOW] for i in range(count)]
    windows = np.array([model.tokens(part)[:WINDOW] for part in parts])
    seen = [[] for _ in model.layers]
    for some in np.array_split(windows, max(count // 8, 1)):
        model.forward(some, seen=seen)
    experts = {}
    for i, layer in enumerate(model.layers):
        h, chosen, weights = (np.concatenate([part[j] for part in seen[i]]) for j in range(3))
        energy, moments = sum(part[3] for part in seen[i]), unit(h.T @ h)
        for e in range(len(layer["ffn_gate_exps"])):
            row, place = np.nonzero(chosen == e)
            matrices = [layer[f"ffn_{part}_exps"][e] for part in ("gate", "up", "down")]
            experts[i, e] = Expert(*matrices, h[row], weights[row, place, None], moments, energy)
    return experts


def candidates(experts, coder):
    """Name, bytes of all experts and each expert's function, of everything that is compared."""
    one, count = next(iter(experts.values())), len(experts)
    width, weights = len(one.down), one.gate.size * 3

    def alike(name, size, make):
        return name, size * count, {key: make(expert) for key, expert in experts.items()}

    yield alike("leave out", 0, lambda e: lambda x: 0.0)
    yield alike("mean output", 2 * width, lambda e: coder.as_chosen(e, None))
    for rank in (4, 8, 16, 32, 64):
        size = rank * (2 * width + 4) + 2 * width
        yield alike("affine map, int8", size, lambda e: affine_map(e, rank))
    for bits in (2, 3):
        size = weights * bits // 8 + weights // BLOCK * 4
        yield alike("blocks of 32, nearest", size, lambda e: in_blocks(e, bits))
    for dim in COMPARED:
        for step, name in STEPS.items():
            size = copy_bytes(one, dim, dim)
            yield alike(f"vectors, {name}", size, lambda e: coder.copy(e, dim, dim, step))
    whole = count * copy_bytes(one, None, None)
    budgets = [share * whole for share in PACKS] + [count * copy_bytes(one, dim, dim) for dim in COMPARED]
    curves = {key: coder.curve(expert) for key, expert in experts.items()}
    for budget in budgets:
        choices, size = allocate(experts, curves, budget)
        made = {key: coder.as_chosen(expert, choices[key]) for key, expert in experts.items()}
        yield "vectors, all that and allocated", size, made


def print_table(rows, columns):
    """Perplexity ratio / acceptance over all texts, of each name's candidate that is nearest to a column's bytes."""
    cells = {}
    for name, share, text, ratio, _, _, acceptance in rows:
        column = min(columns, key=lambda column: abs(share - column))
        off = abs(share - column)
        if text == "all" and off <= 0.15 * column:
            near = "" if off < 0.002 else f" ({share:.1%})"
            cells[name, column] = min(cells.get((name, column), (2,)), (off, f"{ratio:.3f} / {acceptance:.3f}{near}"))
    print("| every expert becomes | " + " | ".join(f"{column:.1%}" for column in columns) + " |")
    print("|---" * (1 + len(columns)) + "|")
    for name in dict.fromkeys(row[0] for row in rows):
        print(f"| {name} | " + " | ".join(cells.get((name, column), ("", ""))[1] for column in columns) + " |")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="GGUF file of a Qwen3-MoE")
    parser.add_argument("--calibrate", type=Path, required=True, help="text to fit to")
    parser.add_argument("--texts", type=Path, nargs="+", required=True, help="held-out texts, one a domain")
    parser.add_argument("--tokens", type=int, default=2048, help="tokens of each text, in windows of 512")
    parser.add_argument("--windows", type=int, default=64, help="windows of 512 tokens to fit to")
    parser.add_argument("--csv", type=Path, help="keep every figure here")
    args = parser.parse_args()

    model = Model(args.model)
    experts = see(model, args.calibrate.read_text(), args.windows)
    beginning = slice(args.tokens // WINDOW * WINDOW)
    texts = {p.name: np.array(model.tokens(p.read_text())[beginning]).reshape(-1, WINDOW) for p in args.texts}
    full = {name: model.forward(tokens) for name, tokens in texts.items()}
    whole = len(experts) * copy_bytes(next(iter(experts.values())), None, None)

    rows = []
    for name, size, made in candidates(experts, Coder(read_codebooks())):
        device = {text: model.forward(tokens, lambda i, e: made[i, e]) for text, tokens in texts.items()}
        found = [compare(full[text], device[text], tokens) for text, tokens in texts.items()]
        total = np.exp(np.log(found).mean(0))[0], *np.mean(found, 0)[1:]
        rows += [[name, size / whole, text, *figures] for text, figures in zip([*texts, "all"], [*found, total])]
        print(f"{name}: {total[0]:.3f}", file=sys.stderr, flush=True)

    one = next(iter(experts.values()))
    columns = [0, 2 * len(one.down), *(copy_bytes(one, dim, dim) for dim in COMPARED)]
    print_table(rows, [size * len(experts) / whole for size in columns])
    if args.csv:
        with args.csv.open("w", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(["standin", "bytes", "text", "ppl_ratio", "kl", "top1", "acceptance"])
            writer.writerows(rows)


if __name__ == "__main__":
    main()
