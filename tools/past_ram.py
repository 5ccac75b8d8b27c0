"""Measures a model that does not fit in memory: ours and llama.cpp's speed inside a control group's memory limit.

    python tools/past_ram.py --model M.gguf --llama-bench PATH --csv past-ram.csv

For each share the group may use that share of the file plus 400 MB, and our expert cache is asked for the same share of
the experts. Before each run the page cache is dropped, and as much memory as the group may use is touched: a virtual
machine's host backs memory when it is first touched, more slowly than a disk reads. What a program reads is what the
kernel counts for it. All tokens count, those too that find the expert cache empty: take enough of them.

The limit on speed is the disk's: expert-sized pieces at random places, as many in flight as a layer has, read past the
page cache. A disk that others share is faster and slower from one second to the next, so our program is stopped every few
seconds for such reads, and that time does not count. A virtual disk may read a piece into contiguous memory faster than
into scattered pages, so both are measured: huge pages, and small ones in no order, which is what a page cache is made of.

Needs root, for the group, and a machine that holds the model, for the resident run that the output must equal. Control
groups of version 1 and 2 both do.
"""

import argparse
import csv
import hashlib
import json
import mmap
import os
import random
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

HEADROOM = 400_000_000
IN_FLIGHT = 8
HUGE_PAGE = 2 << 20
SECONDS_BETWEEN_STOPS = 4


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="GGUF file, on the disk to be measured")
    parser.add_argument("--llama-bench", type=Path, help="llama.cpp's, to compare with")
    parser.add_argument("--outrigger", type=Path, default=Path("target/release/outrigger"), help="our binary")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--shares", default="50,25", help="percent of file and experts, with commas")
    parser.add_argument("--tokens", type=int, default=120, help="tokens that we decode")
    parser.add_argument("--llama-tokens", type=int, default=8, help="tokens that llama.cpp decodes")
    parser.add_argument("--csv", type=Path, help="write the figures here")
    return parser.parse_args()


class Group:
    """A control group with a memory limit, for one program after another."""

    def __init__(self, limit):
        root = Path("/sys/fs/cgroup")
        first = (root / "memory").is_dir()
        self.path = (root / "memory" if first else root) / "past-ram"
        self.path.mkdir(exist_ok=True)
        names = ("limit_in_bytes", "max_usage_in_bytes") if first else ("max", "peak")
        self.limit, self.peak = (self.path / f"memory.{name}" for name in names)
        self.first, self.size = first, limit
        self.limit.write_text(str(limit))

    def failures(self):
        """How often the limit was hit."""
        if self.first:
            return int((self.path / "memory.failcnt").read_text())
        events = dict(line.split() for line in (self.path / "memory.events").read_text().splitlines())
        return int(events["max"])

    def run(self, command, while_stopped=None):
        """Standard output, bytes read from disk, peak memory and how often the limit was hit. The program is stopped
        every few seconds for `while_stopped`, until it prints something."""
        drop_page_cache()
        touch_memory(self.size)
        failures = self.failures()
        procs = self.path / "cgroup.procs"
        child = subprocess.Popen(
            list(map(str, command)),
            stdout=subprocess.PIPE,
            text=True,
            preexec_fn=lambda: procs.write_text(str(os.getpid())),
        )
        while while_stopped and not select.select([child.stdout], [], [], SECONDS_BETWEEN_STOPS)[0]:
            child.send_signal(signal.SIGSTOP)
            while_stopped()
            child.send_signal(signal.SIGCONT)
        out = child.stdout.read()
        _, status, usage = os.wait4(child.pid, 0)
        if status != 0:
            raise RuntimeError(f"{command[0]} ended with status {status}")
        return out, usage.ru_inblock * 512, int(self.peak.read_text()), self.failures() - failures

    def remove(self):
        self.path.rmdir()


def drop_page_cache():
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3")


def touch_memory(size):
    """Writes to each page of so many bytes, and lets go of them."""
    with mmap.mmap(-1, size) as memory:
        memory[:: mmap.PAGESIZE] = bytes(-(-size // mmap.PAGESIZE))


def read_bandwidth(path, piece, huge, seconds=0.7):
    """Bytes a second, reading pieces at random places past the page cache, IN_FLIGHT at a time, into huge pages or into
    small ones in no order."""
    piece = -(-piece // mmap.PAGESIZE) * mmap.PAGESIZE
    room = -(-piece // HUGE_PAGE) * HUGE_PAGE
    memory = mmap.mmap(-1, IN_FLIGHT * room, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE if huge else mmap.MADV_NOHUGEPAGE)
    pages = range(0, len(memory), mmap.PAGESIZE)
    for page in random.sample(pages, len(pages)):
        memory[page] = 1
    file = os.open(path, os.O_RDONLY | os.O_DIRECT)
    places = os.fstat(file).st_size // piece
    done = [0] * IN_FLIGHT
    start = time.monotonic()

    def reader(number):
        choose = random.Random(number + start)
        buffer = memoryview(memory)[number * room :][:piece]
        while time.monotonic() < start + seconds:
            done[number] += os.preadv(file, [buffer], choose.randrange(places) * piece)

    threads = [threading.Thread(target=reader, args=(number,)) for number in range(IN_FLIGHT)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    os.close(file)
    return sum(done) / (time.monotonic() - start)


def evaluate(args, share, ids, logits):
    return [
        *(args.outrigger, "eval", "-m", args.model, "-t", args.threads, "-c", len(ids) + 1, "--batch", 1),
        *("--expert-cache", f"{share}%", "--token-ids", ",".join(map(str, ids)), "--save-logits", logits, "--json"),
    ]


class Digest(threading.Thread):
    """Of what is written to a pipe: the pages of a file would count as the group's memory."""

    def __init__(self, pipe):
        super().__init__(daemon=True)
        self.pipe = pipe
        self.start()

    def run(self):
        with self.pipe.open("rb") as file:
            self.hex = hashlib.file_digest(file, "sha256").hexdigest()

    def wait(self):
        self.join()
        return self.hex


def measure(args, share, ids, expected, sizes, logits):
    limit = sizes["file_bytes"] * share // 100 + HEADROOM
    group = Group(limit)
    output = Digest(logits)
    stops = []

    def read():
        start = time.monotonic()
        piece = sizes["expert_bytes"] // 3
        small, huge = (read_bandwidth(args.model, piece, huge) for huge in (False, True))
        stops.append((small, huge, time.monotonic() - start))

    out, disk, peak, failures = group.run(evaluate(args, share, ids, logits), read)
    small, huge, stopped = (sum(column) / len(stops) for column in zip(*stops))
    found = json.loads(out.splitlines()[-1])
    speed = len(ids) / (found["seconds"] - stopped * len(stops))
    misses = found["cache"]["misses"] / len(ids)
    missed = misses * sizes["expert_bytes"]
    row = {
        "share": share,
        "limit": limit,
        "peak": peak,
        "limit_hits": failures,
        "same_output": output.wait() == expected,
        "tok_s": speed,
        "misses_per_token": misses,
        "missed_bytes_per_token": missed,
        # The trunk is read once.
        "disk_bytes_per_token": (disk - sizes["trunk_bytes"]) / len(ids),
        "disk_gb_s": small / 1e9,
        "of_disk_limit": speed / (small / missed),
        "huge_disk_gb_s": huge / 1e9,
        "of_huge_disk_limit": speed / (huge / missed),
    }
    if args.llama_bench:
        sizes = ["-p", 0, "-n", args.llama_tokens, "-r", 1, "-t", args.threads]
        out, disk, _, _ = group.run([args.llama_bench, "-m", args.model, *sizes, "-lm", "mmap", "--repack", 0, "-o", "json"])
        row["llama_tok_s"] = json.loads(out)[0]["avg_ts"]
        row["llama_disk_bytes"] = disk
        row["times_llama"] = row["tok_s"] / row["llama_tok_s"]
    group.remove()
    return row


def main():
    args = parse_args()
    inspected = subprocess.run([args.outrigger, "inspect", args.model, "--json"], capture_output=True, check=True)
    sizes = json.loads(inspected.stdout)
    choose = random.Random(1)
    ids = [choose.randrange(sizes["vocabulary"]) for _ in range(args.tokens)]
    rows = []
    with tempfile.TemporaryDirectory() as directory:
        logits = Path(directory) / "logits"
        os.mkfifo(logits)
        output = Digest(logits)
        subprocess.run(list(map(str, evaluate(args, 100, ids, logits))), stdout=subprocess.DEVNULL, check=True)
        expected = output.wait()
        for share in map(int, args.shares.split(",")):
            rows.append(measure(args, share, ids, expected, sizes, logits))
            print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    for name in rows[0]:
        cells = [f"{row[name]:.3f}" if isinstance(row[name], float) else str(row[name]) for row in rows]
        print(f"| {name} | {' | '.join(cells)} |")
    if args.csv:
        with args.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0].keys())
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
