"""Compares logits that we saved with those of llama.cpp and of Hugging Face transformers on the same token ids.

    outrigger eval -m M.gguf --token-ids 1,2,3 --save-logits ours.f32
    python tools/compare_logits.py --model M.gguf --tokens tokens.json --logits ours.f32 --llama-cpp --hf DIR

Prints a line an oracle: mean KL in nats a token, top-1 agreement, largest absolute difference.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import oracles


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="GGUF file")
    parser.add_argument("--tokens", type=Path, required=True, help="JSON list of token ids")
    parser.add_argument("--logits", type=Path, required=True, help="ours: little-endian f32 [tokens, vocab]")
    parser.add_argument("--reference", type=Path, action="append", default=[], help="other saved logits, .f32 or .f16")
    parser.add_argument("--llama-cpp", action="store_true", help="compare with llama.cpp, f32 and f16 keys and values")
    parser.add_argument("--hf", type=Path, help="the model in Hugging Face layout: compare with transformers")
    parser.add_argument("--max-kl", type=float, help="fail above this mean KL")
    parser.add_argument("--min-top1", type=float, help="fail below this top-1 agreement")
    parser.add_argument("--max-abs", type=float, help="fail above this absolute difference")
    return parser.parse_args()


def references(args, ids):
    """Yields (name, logits) for every oracle that was asked for."""
    for path in args.reference:
        yield path.name, np.fromfile(path, "<f2" if path.suffix == ".f16" else "<f4").reshape(len(ids), -1)
    if args.llama_cpp:
        yield "llama.cpp, f32 KV", oracles.llama_cpp_logits(args.model, ids, "f32")
        yield "llama.cpp, f16 KV", oracles.llama_cpp_logits(args.model, ids, "f16")
    if args.hf:
        yield "transformers, this file's weights", oracles.transformers_logits(args.hf, ids, args.model)
        yield "transformers, original weights", oracles.transformers_logits(args.hf, ids)


def main():
    args = parse_args()
    ids = json.loads(args.tokens.read_text())
    ours = np.fromfile(args.logits, "<f4").reshape(len(ids), -1)
    failed = False
    print("| oracle | mean KL | top-1 agreement | max abs difference |")
    print("|---|---|---|---|")
    for name, theirs in references(args, ids):
        kl, top1, max_abs = oracles.differences(ours, theirs.astype(np.float32))
        print(f"| {name} | {kl:.3g} | {100 * top1:.2f} % | {max_abs:.3g} |", flush=True)
        failed |= args.max_kl is not None and not kl <= args.max_kl
        failed |= args.min_top1 is not None and not top1 >= args.min_top1
        failed |= args.max_abs is not None and not max_abs <= args.max_abs
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
