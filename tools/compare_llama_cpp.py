"""Measures our speed beside llama.cpp's on the same file, alternating, so that both meet the same machine.

    python tools/compare_llama_cpp.py --llama-bench PATH --model M.gguf --threads 2 --csv speed.csv
    python tools/compare_llama_cpp.py --build DIR --model M.gguf --threads 2

The first takes a llama-bench that is there; the second fetches the sources from PyPI (the sdist of llama-cpp-python
holds llama.cpp) and builds it under DIR, which takes minutes and needs a C++ compiler. llama.cpp runs with its weights
as they are (`--repack 0`) and rearranged for the processor (`--repack 1`); the ratio is to the better of the two.
"""

import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
import sysconfig
import tarfile
from pathlib import Path

PEER = "llama-cpp-python==0.3.36"
CMAKE_FLAGS = [
    "-DCMAKE_BUILD_TYPE=Release", "-DGGML_NATIVE=ON", "-DGGML_RPC=ON", "-DLLAMA_CURL=OFF", "-DLLAMA_BUILD_TESTS=OFF",
    "-DLLAMA_BUILD_UI=OFF",
]  # fmt: skip


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    peer = parser.add_mutually_exclusive_group(required=True)
    peer.add_argument("--llama-bench", type=Path, help="a llama-bench built already")
    peer.add_argument("--build", type=Path, help="directory to fetch and build llama.cpp in")
    parser.add_argument("--model", type=Path, required=True, help="GGUF file")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--outrigger", type=Path, default=Path("target/release/outrigger"), help="our binary")
    parser.add_argument("-p", "--prompt", type=int, default=512, help="tokens of prefill; 0 for none")
    parser.add_argument("-n", "--generate", type=int, default=64, help="tokens of decode; 0 for none")
    parser.add_argument("--rounds", type=int, default=3, help="times that each program runs")
    parser.add_argument("--csv", type=Path, help="write every single measurement here")
    return parser.parse_args()


def build(directory):
    """llama-bench from the sdist, with cmake and ninja from PyPI."""
    directory.mkdir(parents=True, exist_ok=True)
    pip = [sys.executable, "-m", "pip"]
    subprocess.run([*pip, "install", "--quiet", "cmake", "ninja"], check=True)
    name, version = PEER.split("==")
    subprocess.run(
        [*pip, "download", "--quiet", "--no-deps", "--no-binary", name, PEER, "--dest", directory], check=True
    )
    stem = f"{name.replace('-', '_')}-{version}"
    with tarfile.open(directory / f"{stem}.tar.gz") as sdist:
        sdist.extractall(directory, filter="data")
    source, output = directory / stem / "vendor/llama.cpp", directory / "build"
    path = f"{sysconfig.get_path('scripts')}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PATH": path}
    configure = ["cmake", "-G", "Ninja", "-S", source, "-B", output, *CMAKE_FLAGS]
    subprocess.run(configure, check=True, env=environment)
    subprocess.run(["ninja", "-C", output, "llama-bench"], check=True, env=environment)
    return output / "bin/llama-bench"


def run(command):
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{command[0]} ended with {done.returncode}: {done.stderr.strip()[-500:]}")
    return done.stdout


def ours(args):
    """{prefill, decode} in tok/s. As llama-bench does it, decoding begins with an empty context."""

    def bench(prompt, generate):
        sizes = ["-p", prompt, "-n", generate, "-t", args.threads, "-r", 1]
        return json.loads(run([args.outrigger, "bench", "-m", args.model, *sizes, "--json"]).splitlines()[-1])

    measured = {}
    if args.prompt:
        measured["prefill"] = bench(args.prompt, 1)["prefill_tok_s"]
    if args.generate:
        measured["decode"] = bench(1, args.generate)["decode_tok_s"]
    return measured


def llama_cpp(args, bench, repack):
    sizes = ["-p", args.prompt, "-n", args.generate, "-t", args.threads, "-r", 1]
    found = json.loads(run([bench, "-m", args.model, *sizes, "--repack", repack, "-o", "json"]))
    return {"prefill" if test["n_gen"] == 0 else "decode": test["avg_ts"] for test in found}


def main():
    args = parse_args()
    bench = build(args.build) if args.build else args.llama_bench
    programs = {
        "outrigger": lambda: ours(args),
        "llama.cpp, repack 0": lambda: llama_cpp(args, bench, 0),
        "llama.cpp, repack 1": lambda: llama_cpp(args, bench, 1),
    }
    measured = {name: [] for name in programs}
    for number in range(args.rounds):
        for name, measure in programs.items():
            try:
                measured[name].append(measure())
                print(f"round {number + 1}: {name} {measured[name][-1]}", file=sys.stderr, flush=True)
            except RuntimeError as error:
                # Our own failure is one; llama.cpp's repacked kernels die on some compilers and machines.
                if name == "outrigger":
                    raise
                print(f"round {number + 1}: {error}", file=sys.stderr)

    phases = {"prefill": args.prompt, "decode": args.generate}
    phases = {phase: tokens for phase, tokens in phases.items() if tokens}
    medians = {
        name: {phase: statistics.median(run[phase] for run in runs) for phase in phases}
        for name, runs in measured.items()
        if runs
    }
    peers = [median for name, median in medians.items() if name != "outrigger"]
    columns = [f"{phase} {tokens} tok/s" for phase, tokens in phases.items()]
    print(f"| median of {args.rounds}, {args.threads} threads | {' | '.join(columns)} |")
    print("|---" * (len(columns) + 1) + "|")
    for name, median in medians.items():
        print(f"| {name} | {' | '.join(f'{median[phase]:.2f}' for phase in phases)} |")
    if peers:
        ratios = [medians["outrigger"][phase] / max(p[phase] for p in peers) for phase in phases]
        print(f"| outrigger / better llama.cpp | {' | '.join(f'{ratio:.2f}' for ratio in ratios)} |")
    if args.csv:
        with args.csv.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["program", "round", *(f"{phase}_tok_s" for phase in phases)])
            for name, runs in measured.items():
                writer.writerows([name, i + 1, *(run[phase] for phase in phases)] for i, run in enumerate(runs))


if __name__ == "__main__":
    main()
