"""Makes tests/fixtures/demo: what llama.cpp and transformers make of 256 tokens with the demo model: the
beginnings of some held-out texts, one after the other.

Writes tokens.json, and as little-endian f16 [tokens, vocab] transformers.f16 (f32 arithmetic on the GGUF's dequantised
weights) and llama.cpp-all-experts.f16 (the GGUF itself with every expert in use, f32 keys and values). Prints how the two programs
differ from each other, from the original weights and from themselves in f16, which is the floor under any tolerance that a
test may ask for.

    python tools/make_demo_fixtures.py --hf DIR --model models/demo.gguf --out tests/fixtures/demo \
        --texts val-prose.txt val-tales.txt val-code.txt val-romance.txt
"""

import argparse
import json
import shutil
import tempfile
from pathlib import Path

import gguf
import numpy as np
import oracles
from tokenizers import Tokenizer


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hf", type=Path, required=True, help="the demo model in Hugging Face layout")
    parser.add_argument("--model", type=Path, required=True, help="the same as GGUF")
    parser.add_argument("--texts", type=Path, nargs="+", required=True, help="held-out texts, whose beginnings are used")
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--skip", type=int, default=0, help="tokens of each text, to see what another choice gives")
    parser.add_argument("--out", type=Path, required=True, help="directory of the fixtures")
    args = parser.parse_args()

    tokenizer, share = Tokenizer.from_file(str(args.hf / "tokenizer.json")), args.tokens // len(args.texts)
    start, end = args.skip, args.skip + share
    beginnings = [path.read_text(encoding="utf-8")[: 16 * end] for path in args.texts]
    ids = [token for text in beginnings for token in tokenizer.encode(text).ids[start:end]]
    transformers = oracles.transformers_logits(args.hf, ids, args.model)
    llama_cpp = oracles.llama_cpp_logits(args.model, ids, "f32")
    with tempfile.TemporaryDirectory() as directory:
        every, count = every_expert(args.model, Path(directory) / "every.gguf")
        transformers_every = oracles.transformers_logits(args.hf, ids, args.model, num_experts_per_tok=count)
        llama_cpp_every = oracles.llama_cpp_logits(every, ids, "f32")
        llama_cpp_every_f16 = oracles.llama_cpp_logits(every, ids, "f16")

    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "tokens.json").write_text(json.dumps(ids) + "\n")
    transformers.astype("<f2").tofile(args.out / "transformers.f16")
    llama_cpp_every.astype("<f2").tofile(args.out / "llama.cpp-all-experts.f16")

    def row(name, a, b):
        kl, top1, max_abs = oracles.differences(a.astype(np.float32), b.astype(np.float32))
        print(f"| {name} | {kl:.3g} | {100 * top1:.2f} % | {max_abs:.3g} |")

    print("| pair | mean KL | top-1 agreement | max abs difference |\n|---|---|---|---|")
    row("llama.cpp, transformers", llama_cpp, transformers)
    row("llama.cpp with f16 keys and values, with f32", oracles.llama_cpp_logits(args.model, ids, "f16"), llama_cpp)
    row("transformers on original weights, on the GGUF's", oracles.transformers_logits(args.hf, ids), transformers)
    row("transformers rounded to f16, in f32", transformers.astype("<f2"), transformers)
    row("every expert in use: llama.cpp, transformers", llama_cpp_every, transformers_every)
    row("every expert in use: llama.cpp with f16 keys and values, with f32", llama_cpp_every_f16, llama_cpp_every)


def every_expert(model: Path, copy: Path) -> tuple[Path, int]:
    """A copy of the model that uses all its experts for each token, and their number."""
    shutil.copyfile(model, copy)
    fields = gguf.GGUFReader(copy, "r+").fields
    architecture = str(bytes(fields["general.architecture"].parts[-1]), "utf-8")
    used, count = (fields[f"{architecture}.{key}"].parts[-1] for key in ("expert_used_count", "expert_count"))
    used[0] = count[0]
    return copy, int(count[0])


if __name__ == "__main__":
    main()
