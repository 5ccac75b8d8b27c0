"""Measures what degradation costs on a model: perplexity against the full model, server gone, for each policy.

    python tools/measure_degradation.py --outrigger target/release/outrigger --model models/demo.gguf \
        --texts val-prose.txt val-tales.txt val-code.txt val-romance.txt

Each text in windows of 512 tokens: the first 256 run connected and warm the expert cache, then the link is cut and the
rest is scored, token by token. Prints a Markdown table of the geometric mean over texts of the perplexity ratio, and the
mean coverage; `--csv FILE` keeps every figure.
"""

import argparse
import csv
import json
import math
import subprocess
from pathlib import Path

POLICIES = ["leave-out", "renormalise", "reroute"]
CACHES = ["0%", "25%", "50%", "75%"]


def evaluate(args, text, *flags):
    command = [args.outrigger, "eval", "-m", args.model, "-f", text, "--tokens", str(args.tokens), "--window", "512",
               "--offline-after", "256", "--json", *flags]  # fmt: skip
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return json.loads(output.splitlines()[-1])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--outrigger", type=Path, required=True, help="the command")
    parser.add_argument("--model", type=Path, required=True, help="GGUF file")
    parser.add_argument("--texts", type=Path, nargs="+", required=True, help="held-out texts, one a domain")
    parser.add_argument("--tokens", type=int, default=3072, help="tokens of each text")
    parser.add_argument("--csv", type=Path, help="keep every figure here")
    args = parser.parse_args()

    full = {text: evaluate(args, text)["nll"] for text in args.texts}
    rows = []
    print("| policy | " + " | ".join(f"{cache} resident" for cache in CACHES) + " |")
    print("|---" * (len(CACHES) + 1) + "|")
    for policy in POLICIES:
        cells = []
        for cache in CACHES:
            found = [
                evaluate(args, text, "--policy", policy, "--expert-cache", cache, "--elsewhere", "absent")
                for text in args.texts
            ]
            excess = [figures["nll"] - full[text] for figures, text in zip(found, args.texts)]
            coverage = sum(figures["coverage"] for figures in found) / len(found)
            cells.append(f"{math.exp(sum(excess) / len(excess)):.3f} / {coverage:.2f}")
            rows += [
                [policy, cache, text.name, full[text], figures["nll"], figures["coverage"]]
                for figures, text in zip(found, args.texts)
            ]
        print(f"| {policy} | " + " | ".join(cells) + " |", flush=True)
    if args.csv:
        with args.csv.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["policy", "cache", "text", "full_nll", "nll", "coverage"])
            writer.writerows(rows)


if __name__ == "__main__":
    main()
