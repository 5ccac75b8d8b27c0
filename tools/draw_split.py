"""Draws the README's picture: what runs on the device, what on the server, and where the line can be cut.

Fills and mid-greys only, on no background, so that it reads on light and dark pages alike.

    python tools/draw_split.py --out docs/split.svg
"""

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

GREY, TRUNK, ROUTER, EXPERT, CUT = "#7d8590", "#4a78b5", "#b8702a", "#3d8f63", "#d1495b"
HOT = {1, 6, 8, 11, 13}


def box(ax, x, y, w, h, text, colour):
    ax.add_patch(FancyBboxPatch((x, y), w, h, boxstyle="round,pad=0,rounding_size=0.12", fc=colour, ec="none"))
    ax.text(x + w / 2, y + h / 2, text, color="white", ha="center", va="center", fontsize=11, linespacing=1.4)


def frame(ax, x, y, w, h, title):
    ax.add_patch(
        FancyBboxPatch((x, y), w, h, boxstyle="round,pad=0,rounding_size=0.2", fc="none", ec=GREY, lw=1.4)
    )
    ax.text(x + 0.25, y + h - 0.32, title, color=GREY, fontsize=13, weight="bold", va="center")


def experts(ax, x, y, columns, rows, filled, size=0.36, gap=0.09):
    """A grid of experts: filled where they are, dashed where they are not."""
    for i in range(columns * rows):
        corner = (x + i % columns * (size + gap), y + (rows - 1 - i // columns) * (size + gap))
        style = dict(fc=EXPERT, ec="none") if i in filled else dict(fc="none", ec=GREY, lw=0.9, ls=(0, (2, 2)))
        ax.add_patch(Rectangle(corner, size, size, **style))


def arrow(ax, start, end, colour=GREY, bend=0.0, lw=1.6):
    ax.add_patch(
        FancyArrowPatch(
            start, end, arrowstyle="-|>", mutation_scale=13, color=colour, lw=lw, shrinkA=0, shrinkB=0,
            connectionstyle=f"arc3,rad={bend}",
        )
    )  # fmt: skip


def label(ax, x, y, text, colour=GREY, **style):
    ax.text(x, y, text, **(dict(color=colour, fontsize=10, ha="center", va="center", linespacing=1.35) | style))


def draw(ax):
    frame(ax, 0.1, 0.3, 6.7, 4.6, "device")
    box(ax, 0.35, 2.95, 1.85, 1.05, "trunk\nattention, norms", TRUNK)
    box(ax, 2.6, 2.95, 1.6, 1.05, "router\ntop-k experts", ROUTER)
    experts(ax, 4.75, 2.68, 4, 4, HOT)
    label(ax, 5.6, 2.36, "hot experts (dashed: absent)")
    box(ax, 2.6, 0.75, 1.6, 1.05, "combine\nweighted sum", ROUTER)
    arrow(ax, (2.2, 3.48), (2.6, 3.48))
    arrow(ax, (4.2, 3.48), (4.72, 3.48))
    arrow(ax, (4.85, 2.2), (4.23, 1.55), bend=-0.15)
    arrow(ax, (2.6, 1.28), (1.28, 2.95), bend=-0.35)
    label(ax, 1.1, 1.05, "next layer,\nnext token")

    frame(ax, 10.1, 0.3, 3.0, 4.6, "expert server")
    experts(ax, 10.73, 2.25, 4, 4, set(range(16)))
    label(ax, 11.6, 1.92, "all experts, or a part")
    label(ax, 11.6, 1.2, "keeps no session:\nany server of the same\nmodel can answer")

    arrow(ax, (6.85, 3.48), (10.05, 3.48))
    label(ax, 8.45, 3.95, "rows for absent experts,\none call a layer")
    arrow(ax, (10.05, 1.28), (4.23, 1.28))
    label(ax, 8.45, 0.8, "one weighted sum a row")
    label(ax, 7.55, 2.38, "gRPC", fontsize=12, weight="bold")

    ax.plot([8.45, 8.3, 8.6, 8.45], [3.2, 2.52, 2.24, 1.56], color=CUT, lw=2, ls=(0, (4, 2)))
    label(ax, 9.36, 2.38, "cut here:\ncoarser,\nnot silent", CUT)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="SVG or PNG file to write")
    args = parser.parse_args()
    # The same bytes every time: no date, no random ids.
    plt.rcParams["svg.hashsalt"] = "split"
    figure, ax = plt.subplots(figsize=(13.5, 5.2))
    draw(ax)
    ax.set(xlim=(0, 13.2), ylim=(0.15, 5.05), aspect="equal")
    ax.axis("off")
    metadata = {"Date": None} if args.out.suffix == ".svg" else None
    figure.savefig(args.out, transparent=True, bbox_inches="tight", pad_inches=0.05, metadata=metadata)


if __name__ == "__main__":
    main()
