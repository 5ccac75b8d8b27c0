"""Measures decoding with every expert on a server beside llama.cpp's RPC, one thread each side, through our delay proxy.

    python tools/compare_remote.py --llama-bin DIR --model M.gguf --layers 16 --csv remote.csv

DIR holds llama-bench and ggml-rpc-server. Programs alternate, so that both meet the same machine. A token has one round trip
a layer, so that no program can be faster than 1 / (compute + layers * round trip); the share is of that, with the time of
a token at round trip 0 as compute.
"""

import argparse
import contextlib
import csv
import json
import socket
import statistics
import subprocess
import time
from pathlib import Path


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llama-bin", type=Path, help="directory of llama-bench and ggml-rpc-server; without it only ours")
    parser.add_argument("--bin", type=Path, default=Path("target/release"), help="directory of our binaries")
    parser.add_argument("--model", type=Path, required=True, help="GGUF file")
    parser.add_argument("--layers", type=int, required=True, help="layers of the model")
    parser.add_argument("--rtt", type=int, nargs="+", default=[0, 5, 20], help="round trips in ms")
    parser.add_argument("-n", "--generate", type=int, default=24, help="tokens of decode")
    parser.add_argument("--rounds", type=int, default=3, help="times that each is measured")
    parser.add_argument("--csv", type=Path, help="write every single measurement here")
    return parser.parse_args()


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def wait_for(port):
    for _ in range(600):
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
            return
        time.sleep(0.1)
    raise RuntimeError(f"nothing listens on port {port}")


@contextlib.contextmanager
def running(command, port):
    """`command`, as soon as it listens on `port`, until the end of the block."""
    process = subprocess.Popen(list(map(str, command)), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_for(port)
        yield port
    finally:
        process.kill()
        process.wait()


@contextlib.contextmanager
def behind(args, rtt, command, port):
    """The port of a proxy of round trip `rtt` ms before the server `command`, which listens on `port`."""
    at = free_port()
    proxy = [args.bin / "outrigger", "proxy", "--listen", f"127.0.0.1:{at}", "--to", f"127.0.0.1:{port}", "--rtt", rtt]
    with running(command, port), running(proxy, at):
        yield at


def run(command):
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{command[0]} ended with {done.returncode}: {done.stderr.strip()[-500:]}")
    return done.stdout


def ours(args, rtt):
    port = free_port()
    server = [args.bin / "outrigger-server", "-m", args.model, "--threads", 1, "--listen", f"127.0.0.1:{port}"]
    with behind(args, rtt, server, port) as at:
        bench = [args.bin / "outrigger", "bench", "-m", args.model, "-t", 1, "-p", 1, "-n", args.generate, "-r", 1, "--json"]
        bench += ["--server", f"127.0.0.1:{at}", "--expert-cache", "0%", "--elsewhere", "absent", "--on-miss", "wait"]
        return json.loads(run(bench).splitlines()[-1])["decode_tok_s"]


def llama_cpp(args, rtt):
    port = free_port()
    server = [args.llama_bin / "ggml-rpc-server", "-H", "127.0.0.1", "-p", port, "-t", 1]
    with behind(args, rtt, server, port) as at:
        bench = [args.llama_bin / "llama-bench", "-m", args.model, "-t", 1, "-p", 0, "-n", args.generate, "-r", 1, "-o", "json"]
        bench += ["--rpc", f"127.0.0.1:{at}", "-ngl", 0, "-ot", f"exps=RPC0[127.0.0.1:{at}]"]
        return json.loads(run(bench))[0]["avg_ts"]


def main():
    args = parse_args()
    programs = {"outrigger": ours} | ({"llama.cpp RPC": llama_cpp} if args.llama_bin else {})
    rows = []
    for number in range(args.rounds):
        for rtt in args.rtt:
            for name, measure in programs.items():
                rows.append((name, rtt, number + 1, measure(args, rtt)))

    def median(name, rtt):
        return statistics.median(speed for program, at, _, speed in rows if (program, at) == (name, rtt))

    columns = list(programs) + (["ratio"] if args.llama_bin else []) + ["share of the limit"]
    print(f"| round trip, median of {args.rounds} | {' | '.join(columns)} |")
    print("|---" * (len(columns) + 1) + "|")
    for rtt in args.rtt:
        speeds = [median(name, rtt) for name in programs]
        ratio = [f"{speeds[0] / speeds[1]:.2f}"] if args.llama_bin else []
        limit = 1 / (1 / median("outrigger", args.rtt[0]) + args.layers * rtt / 1000)
        cells = [f"{speed:.2f} tok/s" for speed in speeds] + ratio + [f"{speeds[0] / limit:.3f}"]
        print(f"| {rtt} ms | {' | '.join(cells)} |")
    if args.csv:
        with args.csv.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["program", "rtt_ms", "round", "decode_tok_s"])
            writer.writerows(rows)


if __name__ == "__main__":
    main()
