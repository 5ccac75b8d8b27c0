"""Draws the plots of docs/degradation.md from the figures beside them.

    python tools/draw_degradation.py --out docs

Reads what measure_degradation.py and compare_standins.py write, OUT/degradation.csv and OUT/degradation-standins.csv;
writes OUT/degradation.svg (quality against bytes) and OUT/degradation-prior.svg (quality against misses).
"""

import argparse
import csv
from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
from matplotlib.ticker import NullLocator

# Okabe and Ito's colours, which nobody confuses.
BLUE, SKY, GREEN, ORANGE, RED, PURPLE = "#0072b2", "#56b4e9", "#009e73", "#e69f00", "#d55e00", "#cc79a7"
GREY = "#767676"
RATIOS = [1.001, 1.003, 1.01, 1.03, 1.1, 1.3, 2, 4, 11, 31, 101]
ACCEPTANCES = [0.1, 0.5, 0.7, 0.8, 0.9, 0.95, 0.97, 0.98]
STYLE = {"svg.hashsalt": "outrigger", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False}


def misses(figures):
    """Share of the model's expert calls that find no expert here, not even one that a prior puts in their place.
    Nothing but a prior may substitute."""
    return (figures["missing"] - figures["substituted"]) / (figures["local"] + figures["missing"])


def swapped(figures):
    """Share of the model's expert calls that a prior gave to another expert, where no expert is absent."""
    return figures["substituted"] / (figures["local"] + figures["missing"])


def read(path):
    def value(text):
        try:
            return float(text)
        except ValueError:
            return text

    with path.open(newline="") as file:
        rows = [{name: value(cell) for name, cell in row.items()} for row in csv.DictReader(file)]
    return [row for row in rows if row["text"] == "all"]


def series(rows, share):
    """Points by ascending bytes: percent, excess of the perplexity ratio over 1, acceptance."""
    return sorted((share(row), row["ppl_ratio"] - 1, row["acceptance"]) for row in rows)


def quality_series(settings, standins):
    """Everything that keeps a device going: label, points, colour, marker, and where the label stands beside the last
    point: points to the right and up, and alignment."""
    packs = [row for row in settings if row["pack"]]
    caches = [row for row in settings if not row["pack"] and row["elsewhere"] == "absent" and not row["prior"]]

    def cached(policy, share):
        here = [row for row in caches if row["policy"] == policy and row["standins"] == share]
        return series(here, lambda row: row["cache"] + row["standins"])

    def every(name):
        return series([row for row in standins if row["standin"] == name], lambda row: 100 * row["bytes"])

    yield "packs", series(packs, lambda row: row["pack"]), BLUE, "o", (8, 0, "left")
    yield "+ 16 % stand-ins", cached("reroute", 16), GREEN, "s", (14, -12, "right")
    yield "+ 8 % stand-ins", cached("reroute", 8), SKY, "s", (46, 14, "right")
    yield "cache, rerouted", cached("reroute", 0), ORANGE, "D", (7, -3, "left")
    yield "cache, left out", cached("leave-out", 0), RED, "v", (7, 5, "left")
    yield "affine maps", every("affine map, int8"), PURPLE, "^", (8, 0, "left")
    yield "blocks, nearest", every("blocks of 32, nearest"), GREY, "P", (7, -9, "left")
    yield "vectors, nearest", every("vectors, nearest"), GREY, "x", (7, -5, "left")


def draw_quality(settings, standins):
    figure, panels = plt.subplots(1, 2, figsize=(10.5, 4.8), layout="constrained")
    for label, points, colour, marker, (right, up, align) in quality_series(settings, standins):
        share, excess, acceptance = zip(*points)
        style = {"color": colour, "marker": marker, "ls": ":" if colour in (GREY, PURPLE) else "-", "ms": 5, "lw": 1.4}
        for panel, values, sign in ((panels[0], excess, 1), (panels[1], [1 - a for a in acceptance], -1)):
            panel.plot(share, values, **style)
            place = {"xytext": (right, sign * up), "textcoords": "offset points", "va": "center", "ha": align}
            panel.annotate(label, (share[-1], values[-1]), color=colour, **place)
    for panel, ticks in ((panels[0], RATIOS), (panels[1], ACCEPTANCES)):
        panel.set_yscale("log")
        panel.set_yticks([abs(tick - 1) for tick in ticks], [f"{tick:g}" for tick in ticks])
        panel.yaxis.set_minor_locator(NullLocator())
        panel.set_xlabel("on the device, % of the experts' bytes in the full model")
        panel.set_xlim(0, 100)
        panel.grid(color="#e5e5e5", lw=0.6)
    panels[0].set_ylabel("perplexity ratio to the full model (log of the excess over 1)")
    panels[1].set_ylabel("acceptance (log of what it lacks to 1)")
    panels[1].invert_yaxis()
    return figure


def draw_prior(settings):
    figure, panels = plt.subplots(1, 3, figsize=(10.5, 3.6), layout="constrained")
    missed, given = "expert calls that miss, %", "expert calls given to another expert, %"
    absent = {"elsewhere": "absent"}
    below, above, before = ((0, -13), "left"), ((0, 8), "left"), ((-9, 0), "right")
    curves = [("absent, left out", {**absent, "policy": "leave-out", "standins": 0}, misses, missed, (below, above)),
              ("absent, stand-ins of 8 %", {**absent, "standins": 8}, misses, missed, (below, above)),
              ("in a local file", {"elsewhere": "cold"}, swapped, given, (before, before))]  # fmt: skip
    for panel, (title, wanted, share, label, names) in zip(panels, curves):
        caches = ((25, BLUE, "o", (-4, 6)), (50, RED, "s", (4, -11)))
        for (cache, colour, marker, number), (offset, align) in zip(caches, names):
            rows = [row for row in settings if row["cache"] == cache]
            rows = sorted((row for row in rows if wanted.items() <= row.items()), key=lambda row: row["prior"])
            points = [(100 * share(row), row["ppl_ratio"]) for row in rows]
            panel.plot(*zip(*points), color=colour, marker=marker, ms=5, lw=1.4)
            for row, point in zip(rows, points):
                place = {"xytext": number, "textcoords": "offset points", "ha": "center", "fontsize": 7.5}
                panel.annotate(f"{row['prior']:g}", point, color=colour, **place)
            place = {"xytext": offset, "textcoords": "offset points", "ha": align}
            panel.annotate(f"cache of {cache} %", points[-1], color=colour, **place)
        panel.margins(0.12)
        panel.set_title(f"other experts: {title}", fontsize=9)
        panel.set_xlabel(label)
        panel.grid(color="#e5e5e5", lw=0.6)
    panels[0].set_ylabel("perplexity ratio to the full model")
    return figure


def draw(out):
    settings, standins = read(out / "degradation.csv"), read(out / "degradation-standins.csv")
    with plt.rc_context(STYLE):
        for name, figure in (
            ("degradation", draw_quality(settings, standins)),
            ("degradation-prior", draw_prior(settings)),
        ):
            figure.savefig(out / f"{name}.svg", metadata={"Date": None})


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="directory of the figures and the plots")
    draw(parser.parse_args().out)


if __name__ == "__main__":
    main()
