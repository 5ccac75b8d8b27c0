"""Asks an expert server for one row through a few experts and checks the answer against numpy.

Shows that the .proto is all that another language needs: the client is generated from it on the fly. The reference
reads the experts' matrices with gguf-py, so that neither the wire, nor the kernels, nor the reader are ours.

    outrigger-server -m models/demo.gguf --listen 127.0.0.1:7070
    python tools/grpc_client.py --server 127.0.0.1:7070 --model models/demo.gguf
"""

import argparse
import importlib
import sys
import tempfile
from pathlib import Path

import gguf
import grpc
import numpy as np
from gguf import GGMLQuantizationType as Type
from grpc_tools import protoc

PROTO_ROOT = Path(__file__).resolve().parents[1] / "proto"
PROTO = "outrigger/v1/experts.proto"


def generate():
    """The message and service modules, from the .proto."""
    with tempfile.TemporaryDirectory() as out:
        arguments = ["protoc", f"-I{PROTO_ROOT}", f"--python_out={out}", f"--grpc_python_out={out}", PROTO]
        if protoc.main(arguments) != 0:
            raise SystemExit(f"{PROTO_ROOT / PROTO}: protoc failed")
        sys.path.insert(0, out)
        try:
            return importlib.import_module("outrigger.v1.experts_pb2"), importlib.import_module(
                "outrigger.v1.experts_pb2_grpc"
            )
        finally:
            sys.path.remove(out)


class Experts:
    """One layer's experts as the model file has them."""

    def __init__(self, model, layer):
        self.tensors = {t.name: t for t in gguf.GGUFReader(model).tensors}
        self.prefix = f"blk.{layer}.ffn_"

    def matrix(self, part, expert):
        """(f32 [rows, cols], type) of one expert; gguf-py's first axis is the slowest, the expert."""
        tensor = self.tensors[f"{self.prefix}{part}_exps.weight"]
        return gguf.quants.dequantize(tensor.data[expert], tensor.tensor_type), tensor.tensor_type

    def run(self, expert, x):
        """SwiGLU: down(silu(gate x) * up x)."""
        gate, up = (self.multiply(part, expert, x) for part in ("gate", "up"))
        return self.multiply("down", expert, gate / (1 + np.exp(-gate)) * up)

    def multiply(self, part, expert, x):
        weights, ty = self.matrix(part, expert)
        return as_kernels_see(x, ty).astype(np.float64) @ weights.T.astype(np.float64)


def as_kernels_see(x, ty):
    """Activations meet quantised weights as 8-bit blocks (ggml's vec_dot_type), f32 and 16-bit weights as they are."""
    if ty in (Type.F32, Type.F16, Type.BF16):
        return x
    x = x.astype(np.float32)
    if ty in (Type.Q8_0, Type.Q4_0):
        return gguf.quants.dequantize(gguf.quants.quantize(x, Type.Q8_0), Type.Q8_0)
    blocks = x.reshape(-1, 256)
    extreme = np.take_along_axis(blocks, np.abs(blocks).argmax(axis=1)[:, None], axis=1)
    scale = np.where(extreme == 0, 1, extreme / -127)
    return (np.rint(blocks / scale).clip(-128, 127) * scale).reshape(x.shape)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--server", required=True, help="host:port")
    parser.add_argument("--model", type=Path, required=True, help="the GGUF file that the server has")
    parser.add_argument("--layer", type=int, default=0)
    parser.add_argument("--experts", default="0,1,5,7", help="which experts to run, ascending")
    parser.add_argument("--tolerance", type=float, default=5e-3, help="largest relative error (L2) that passes")
    args = parser.parse_args()
    experts = [int(e) for e in args.experts.split(",")]
    messages, services = generate()

    with grpc.insecure_channel(args.server) as channel:
        stub = services.ExpertsStub(channel)
        about = stub.Describe(messages.DescribeRequest(), timeout=10)
        print(f"{about.model}: {about.layers} layers of {about.experts} experts, width {about.width}, {about.version}")
        print(f"fingerprint {about.fingerprint.hex()}")

        rng = np.random.default_rng(0)
        row = rng.standard_normal(about.width).astype("<f4")
        weights = rng.dirichlet(np.ones(len(experts))).astype(np.float32)
        # Each expert alone, then all together: the first shows which one is wrong.
        requests = [([e], [w]) for e, w in zip(experts, weights)] + [(experts, weights)]
        layer, worst = Experts(args.model, args.layer), 0.0
        print(f"\n| experts of layer {args.layer} | relative error | compute |\n|---|---|---|")
        for number, (chosen, shares) in enumerate(requests):
            answer = stub.Forward(
                messages.ForwardRequest(
                    request_id=number,
                    fingerprint=about.fingerprint,
                    layer=args.layer,
                    rows=1,
                    encoding=messages.ENCODING_F32,
                    activations=row.tobytes(),
                    groups=[messages.Group(expert=e, rows=[0], weights=[w]) for e, w in zip(chosen, shares)],
                    reply=messages.ENCODING_F32,
                ),
                timeout=10,
            )
            if answer.request_id != number or list(answer.not_run):
                raise SystemExit(f"request {number}: answer to {answer.request_id}, not run: {list(answer.not_run)}")
            sums = np.frombuffer(answer.sums, "<f4")
            expected = sum(w * layer.run(e, row) for e, w in zip(chosen, shares))
            error = np.linalg.norm(sums - expected) / np.linalg.norm(expected)
            worst = max(worst, error if np.isfinite(error) else np.inf)
            print(f"| {', '.join(map(str, chosen))} | {error:.2e} | {answer.compute_us} us |")
    if worst > args.tolerance:
        raise SystemExit(f"relative error {worst:.2e} exceeds {args.tolerance}")


if __name__ == "__main__":
    main()
