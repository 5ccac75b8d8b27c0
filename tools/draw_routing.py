#!/usr/bin/env python3
"""Draw which experts each domain uses: a heat map a layer, from held-out text.

    draw_routing.py --model HF_DIR --corpus DIR --out models/routing-by-domain

Colour is an expert's share of a domain's routed weight, as a multiple of an equal share. Experts
stand in the order of the domain that leans on them most; OUT.svg and OUT.png are written.
"""

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.colors import TwoSlopeNorm
from tokenizers import Tokenizer

from train_demo import DOMAINS, VAL_ROW, VAL_TOKENS, Model, load_hf


class Watched(Model):
    """Adds up the routed weight of every expert, a layer after the other."""

    def experts(self, layer, h):
        top, chosen = F.linear(h.float(), layer.router).topk(self.sizes.num_experts_per_tok, -1)
        count = torch.zeros(self.sizes.num_experts)
        self.routed.append(count.index_add(0, chosen.flatten(), top.softmax(-1).flatten()))
        return super().experts(layer, h)


@torch.no_grad()
def routed_share(model: Watched, ids: np.ndarray) -> torch.Tensor:
    """[layers, experts], each row adding up to 1."""
    rows = torch.from_numpy(ids[: len(ids) // VAL_ROW * VAL_ROW]).view(-1, VAL_ROW)
    total = 0
    for part in rows.split(8):
        model.routed = []
        model(part, part)
        total = total + torch.stack(model.routed)
    return total / total.sum(-1, keepdim=True)


def draw(shares: torch.Tensor, out: Path):
    """shares [domains, layers, experts]."""
    domains, layers, experts = shares.shape
    figure, axes = plt.subplots(layers, 1, figsize=(9, 1.15 * layers + 0.8), layout="constrained")
    scale = TwoSlopeNorm(1.0, vmin=0.0, vmax=4.0)
    for i, axis in enumerate(axes):
        panel = shares[:, i] * experts
        leaning = panel.argmax(0) * 1000 - panel.max(0).values
        picture = axis.imshow(panel[:, leaning.argsort()], aspect="auto", cmap="RdBu_r", norm=scale)
        axis.set_yticks(range(domains), list(DOMAINS), fontsize=8)
        axis.set_xticks([])
        axis.set_ylabel(f"layer {i}", fontsize=9)
    axes[-1].set_xlabel("experts, in the order of the domain that leans on them most", fontsize=9)
    bar = figure.colorbar(picture, ax=axes, ticks=[0, 0.5, 1, 2, 3, 4], shrink=0.6, extend="max")
    bar.set_label("share of routed weight (1 = equal use)", fontsize=9)
    for kind in ("svg", "png"):
        figure.savefig(out.with_suffix(f".{kind}"), dpi=150)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--model", type=Path, required=True)
    p.add_argument("--corpus", type=Path, required=True)
    p.add_argument("--out", type=Path, required=True, help="path without its ending")
    args = p.parse_args()
    torch.set_num_threads(1)
    model = load_hf(args.model)
    model.__class__ = Watched
    tokenizer = Tokenizer.from_file(str(args.model / "tokenizer.json"))
    shares = []
    for domain in DOMAINS:
        text = (args.corpus / f"val-{domain}.txt").read_bytes().decode()
        ids = np.array(tokenizer.encode(text).ids[:VAL_TOKENS], dtype=np.int64)
        shares.append(routed_share(model, ids))
    draw(torch.stack(shares), args.out)


if __name__ == "__main__":
    main()
