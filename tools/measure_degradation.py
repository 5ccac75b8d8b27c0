"""Measures what being without its server costs a device: packs, caches with and without stand-ins, and the prior.

    python tools/measure_degradation.py --outrigger target/release/outrigger --model models/demo.gguf \
        --texts val-prose.txt val-tales.txt val-code.txt val-romance.txt --out docs

Everything by the command line tool alone: `outrigger pack` makes the packs (`--packs DIR` keeps them, and takes those
that are there), `outrigger eval --against-full` measures (docs/meter.md says how), every text in windows of 512 tokens,
one token at a time. Prints the Markdown tables of docs/degradation.md, writes every figure to OUT/degradation.csv and
draws as draw_degradation.py does, which also wants compare_standins.py's OUT/degradation-standins.csv. With `--resume` it
goes on from the figures that OUT/degradation.csv has, which must be of this model, these texts and this build.
"""

import argparse
import csv
import json
import subprocess
import tempfile
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path

from draw_degradation import draw, misses, swapped

PACKS = [10, 20, 35, 50]
CACHES = [25, 50, 75]
STANDINS = [4, 8, 16]
POLICIES = ["leave-out", "renormalise", "reroute"]
PRIORS = [0.0, 0.05, 0.1, 0.2, 0.4]
WINDOW, CONNECTED = 512, 256
# What the project wants to reach: perplexity ratio at most, acceptance at least.
BARS = {"pack 50": (1.004, 0.96), "pack 35": (1.025, 0.91), "pack 20": (1.20, 0.75), "pack 10": (1.9, 0.62),
        "cache 50, stand-ins 8": (1.14, 0.85), "cache 50, reroute": (2.07, None)}  # fmt: skip
FIGURES = ["tokens", "ppl_ratio", "ppl_ratio_low", "ppl_ratio_high", "kl", "top1", "acceptance", "coverage", "standin",
           "local", "missing", "substituted"]  # fmt: skip


@dataclass(frozen=True)
class Setting:
    """A device without its server; shares are percent of the bytes of the full model's experts."""

    pack: int = 0
    cache: int = 0
    standins: int = 0
    elsewhere: str = "absent"
    policy: str = "reroute"
    prior: float = 0.0

    @property
    def name(self):
        if self.pack:
            return f"pack {self.pack}"
        return f"cache {self.cache}, " + (f"stand-ins {self.standins}" if self.standins else self.policy)

    def flags(self, packs):
        if self.pack:
            return ["--offline-after", "0"]
        # With the rest in a local file nothing needs warming, and no clock decides what a server runs.
        connected = CONNECTED if self.elsewhere == "absent" else 0
        flags = ["--offline-after", str(connected), "--expert-cache", f"{self.cache}%", "--elsewhere", self.elsewhere]
        flags += ["--policy", self.policy, "--prior", str(self.prior)]
        return flags + (["--standins", packs[self.standins]] if self.standins else [])


class Bench:
    """Runs the command and keeps what it found, in degradation.csv from the first figure on."""

    def __init__(self, args, packs):
        self.args, self.directory = args, packs
        self.found = self.read() if args.resume else {}

    @cached_property
    def packs(self):
        """The file of each budget that is needed."""
        files = {budget: self.directory / f"{budget}.gguf" for budget in sorted({*PACKS, *STANDINS})}
        for budget, file in files.items():
            if not file.exists():
                self.run("pack", "-m", self.args.model, "--budget", f"{budget}%", "-o", file)
        return files

    def run(self, *command):
        done = subprocess.run([self.args.outrigger, *command], capture_output=True, text=True)
        if done.returncode != 0:
            raise SystemExit(f"outrigger {' '.join(map(str, command))}\n{done.stderr}")
        return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]

    def measure(self, setting):
        """The figures of all texts together; each text's are kept too."""
        if setting not in self.found:
            model = self.packs[setting.pack] if setting.pack else self.args.model
            texts = [flag for text in self.args.texts for flag in ("-f", text)]
            found = self.run(
                "eval", "-m", model, "--against-full", self.args.model, *texts, "--tokens", str(self.args.tokens),
                "--window", str(WINDOW), *setting.flags(self.packs), "--json",
            )  # fmt: skip
            # Calls by where they ran beside the shares, of which one has the same name.
            self.found[setting] = [{**figures["tally"], **figures} for figures in found]
            self.write()
        return self.found[setting][-1]

    def read(self):
        found = {}
        with (self.args.out / "degradation.csv").open(newline="") as file:
            for row in csv.DictReader(file):
                setting = Setting(**{field.name: field.type(row[field.name]) for field in fields(Setting)})
                text = {} if row["text"] == "all" else {"file": row["text"]}
                found.setdefault(setting, []).append(text | {name: json.loads(row[name]) for name in FIGURES})
        return found

    def write(self):
        names = [field.name for field in fields(Setting)]
        with (self.args.out / "degradation.csv").open("w", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow([*names, "text", *FIGURES])
            for setting, lines in self.found.items():
                for line in lines:
                    text = Path(line["file"]).name if "file" in line else "all"
                    writer.writerow([*(getattr(setting, name) for name in names), text, *(line[f] for f in FIGURES)])


def table(title, heads, rows):
    print(f"\n{title}\n\n| " + " | ".join(heads) + " |\n" + "|---" * len(heads) + "|", flush=True)
    for row in rows:
        print("| " + " | ".join(row) + " |", flush=True)


def ratio(figures):
    return f"{figures['ppl_ratio']:.4f} [{figures['ppl_ratio_low']:.4f}, {figures['ppl_ratio_high']:.4f}]"


def quality(figures):
    return [ratio(figures), f"{figures['kl']:.4f}", f"{figures['top1']:.3f}", f"{figures['acceptance']:.3f}"]


def bars(setting):
    at_most, at_least = BARS.get(setting.name, (None, None))
    return f"<= {at_most}" if at_most else "", f">= {at_least}" if at_least else ""


def with_bars(bench, settings):
    for setting in settings:
        (found, *rest), (at_most, at_least) = quality(bench.measure(setting)), bars(setting)
        yield [setting.name, found, at_most, *rest, at_least]


def by_text(bench, settings):
    for setting in settings:
        bench.measure(setting)
        yield [setting.name, *(ratio(line) for line in bench.found[setting][:-1])]


def prior_rows(bench):
    for cache in (25, 50):
        for prior in PRIORS:
            left_out = bench.measure(Setting(cache=cache, prior=prior, policy="leave-out"))
            stood_in = bench.measure(Setting(cache=cache, prior=prior, standins=8))
            cold = bench.measure(Setting(cache=cache, prior=prior, elsewhere="cold"))
            row = [f"{cache}%", f"{prior:g}"]
            for share, figures in ((misses, left_out), (misses, stood_in), (swapped, cold)):
                row += [f"{share(figures):.1%}", f"{figures['ppl_ratio']:.3f}"]
            yield row


def tables(bench):
    quality_heads = ["device", "perplexity ratio", "bar", "KL, nats", "top-1", "acceptance", "bar"]
    packs = [Setting(pack=budget) for budget in PACKS]
    table("Packs, cut off before the first token", quality_heads, with_bars(bench, packs))
    caches = [Setting(policy="leave-out"), *(Setting(cache=c, policy=p) for c in CACHES for p in POLICIES)]
    caches += [Setting(cache=c, standins=s) for c in CACHES for s in STANDINS]
    table("Caches, warmed by 256 tokens", quality_heads, with_bars(bench, caches))
    chosen = [*packs, Setting(cache=50), Setting(cache=50, standins=8)]
    table("By text", ["device", *(text.name for text in bench.args.texts)], by_text(bench, chosen))
    heads = ["cache", "prior", "misses", "ratio, left out", "misses", "ratio, stand-ins 8", "swapped", "ratio, cold"]
    table("The prior", heads, prior_rows(bench))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--outrigger", type=Path, required=True, help="the command")
    parser.add_argument("--model", type=Path, required=True, help="GGUF file of the full model")
    parser.add_argument("--texts", type=Path, nargs="+", required=True, help="held-out texts, one a domain")
    parser.add_argument("--tokens", type=int, default=2048, help="tokens of each text")
    parser.add_argument("--packs", type=Path, help="keep the packs here")
    parser.add_argument("--resume", action="store_true", help="go on from OUT/degradation.csv")
    parser.add_argument("--out", type=Path, required=True, help="directory of degradation.csv and the plots")
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as temporary:
        packs = args.packs or Path(temporary)
        packs.mkdir(parents=True, exist_ok=True)
        bench = Bench(args, packs)
        tables(bench)
    draw(args.out)


if __name__ == "__main__":
    main()
