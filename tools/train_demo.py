#!/usr/bin/env python3
"""Train the small Qwen3-MoE demo model and save it in Hugging Face layout.

    train_demo.py --corpus DIR --out DIR [--init HF_DIR] [--minutes N] [--tokens N] [--resume]

DIR holds `train-<domain>.txt` and `val-<domain>.txt`, documents separated by `<|endoftext|>`.
OUT receives config.json, model.safetensors (bf16), tokenizer.json, val.json (held-out nats a
token), checkpoint.pt (what --resume continues from) and the tokenised texts.

On a CPU, one single-threaded process a core trains on its own rows and the gradients meet in
shared memory: the matrices are small, so this beats many threads on one matrix, and a core lent to
somebody else delays a step instead of every operation. On a GPU one process does it all, and every
expert runs on every token: eight times the arithmetic, in three large products instead of hundreds
of small ones.
"""

import argparse
import ctypes
import json
import math
import os
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

# By default malloc returns the large activations to the kernel after each use, and the page faults
# cost as much as the arithmetic. The settings are read at start-up, hence the exec.
ENVIRONMENT = {
    "MALLOC_MMAP_THRESHOLD_": "2000000000",
    "MALLOC_TRIM_THRESHOLD_": "8000000000",
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
    "TORCHINDUCTOR_COMPILE_THREADS": "1",  # the processes must not start their own
}
if __name__ == "__main__" and not ENVIRONMENT.items() <= os.environ.items():
    os.environ.update(ENVIRONMENT)
    os.execv(sys.executable, [sys.executable, *sys.argv])

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

# How often a row is drawn from each domain: nearer to equal than the sizes of the texts (72 % are
# prose), but not so near that the small ones are learnt by heart.
DOMAINS = {"prose": 0.62, "tales": 0.16, "code": 0.13, "romance": 0.09}
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
# From which share of the run on a row has how many tokens: short rows are cheaper and teach most
# of what long ones do.
ROW_LENGTHS = [(0.0, 256), (0.30, 512), (0.70, 1024)]
VAL_ROW, VAL_TOKENS = 512, 20_480
BF16 = torch.bfloat16

# The whole of config.json; --init takes its sizes from the model it starts from.
CONFIG = dict(
    architectures=["Qwen3MoeForCausalLM"], model_type="qwen3_moe", vocab_size=4096,
    hidden_size=256, intermediate_size=512, num_hidden_layers=6, num_attention_heads=4,
    num_key_value_heads=2, head_dim=64, hidden_act="silu", max_position_embeddings=1024,
    rms_norm_eps=1e-6, rope_theta=10000.0, attention_bias=False, decoder_sparse_step=1,
    moe_intermediate_size=128, num_experts_per_tok=4, num_experts=32, norm_topk_prob=True,
    output_router_logits=False, router_aux_loss_coef=0.003, mlp_only_layers=[],
    tie_word_embeddings=True, torch_dtype="bfloat16", bos_token_id=0, eos_token_id=0,
    use_sliding_window=False, sliding_window=None,
)  # fmt: skip


# ---- model ------------------------------------------------------------------------------------


class Model(torch.nn.Module):
    """Matrices are bf16 (the optimiser keeps f32 masters), gains and routers f32."""

    def __init__(self, config: dict):
        super().__init__()
        self.config, self.sizes, self.dropout = config, SimpleNamespace(**config), 0.0
        s = self.sizes
        wide, narrow = s.num_attention_heads * s.head_dim, s.num_key_value_heads * s.head_dim
        d, e, f = s.hidden_size, s.num_experts, s.moe_intermediate_size
        gain = lambda n: torch.nn.Parameter(torch.ones(n))
        # What a layer adds to the residual stream starts smaller the more layers add to it.
        into_residual = 0.02 / math.sqrt(2 * s.num_hidden_layers)
        self.embed, self.norm = matrix(s.vocab_size, d), gain(d)
        self.layers = torch.nn.ModuleList()
        for _ in range(s.num_hidden_layers):
            layer = torch.nn.Module()
            layer.attn_norm, layer.ffn_norm = gain(d), gain(d)
            layer.q_norm, layer.k_norm = gain(s.head_dim), gain(s.head_dim)
            layer.q, layer.k, layer.v = matrix(wide, d), matrix(narrow, d), matrix(narrow, d)
            layer.o = matrix(d, wide, scale=into_residual)
            layer.router = matrix(e, d, dtype=torch.float32)
            layer.gate_up, layer.down = matrix(e, 2 * f, d), matrix(e, d, f, scale=into_residual)
            self.layers.append(layer)

    def forward(self, ids, targets):
        """ids, targets [rows, n] -> mean loss, load-balancing loss, router z loss."""
        s, (b, n) = self.sizes, ids.shape
        freq = s.rope_theta ** -(torch.arange(0, s.head_dim, 2, device=ids.device) / s.head_dim)
        angle = torch.outer(torch.arange(n, device=ids.device).float(), freq).repeat(1, 2)[:, None]
        cos, sin = angle.cos(), angle.sin()
        drop = lambda t: F.dropout(t.float(), self.dropout, self.training)
        x = drop(F.embedding(ids.flatten(), self.embed))
        balance = z = 0.0
        for layer in self.layers:
            x = x + drop(self.attention(layer, norm(x, layer.attn_norm), b, n, cos, sin))
            y, layer_balance, layer_z = self.experts(layer, norm(x, layer.ffn_norm))
            x, balance, z = x + drop(y), balance + layer_balance, z + layer_z
        logits = F.linear(norm(x, self.norm), self.embed).float()
        loss = F.cross_entropy(logits, targets.flatten())
        return loss, balance / len(self.layers), z / len(self.layers)

    def attention(self, layer, h, b, n, cos, sin):
        s = self.sizes
        shared_by = s.num_attention_heads // s.num_key_value_heads
        heads = lambda w: F.linear(h, w).view(b, n, -1, s.head_dim)
        q = norm_rope(heads(layer.q), layer.q_norm, cos, sin).transpose(1, 2)
        k = norm_rope(heads(layer.k), layer.k_norm, cos, sin).transpose(1, 2)
        k = k.repeat_interleave(shared_by, 1)
        v = heads(layer.v).transpose(1, 2).repeat_interleave(shared_by, 1)
        if h.is_cuda:
            a = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:  # at these lengths plain products are twice as fast as the fused CPU kernel
            mask = torch.full((n, n), -1e4, dtype=BF16).triu(1)
            q, k, v = (t.flatten(0, 1) for t in (q, k, v))
            scores = torch.baddbmm(mask, q, k.transpose(1, 2), alpha=s.head_dim**-0.5)
            a = (scores.softmax(-1) @ v).view(b, -1, n, s.head_dim)
        return F.linear(a.transpose(1, 2).reshape(b * n, -1), layer.o)

    def experts(self, layer, h):
        logits = F.linear(h.float(), layer.router)
        top, chosen = logits.topk(self.sizes.num_experts_per_tok, -1)
        weights = top.softmax(-1)
        run = self.every_expert if h.is_cuda else self.chosen_experts
        y, counts = run(layer, h, weights, chosen)
        # Switch Transformer's balance loss (arXiv 2101.03961, eq. 4) and ST-MoE's z loss.
        shares = counts / chosen.numel() * logits.softmax(-1).mean(0)
        return y, self.sizes.num_experts * shares.sum(), logits.logsumexp(-1).square().mean()

    def every_expert(self, layer, h, weights, chosen):
        """All experts as one wide one; those that were not chosen have the weight zero."""
        e, f = self.sizes.num_experts, self.sizes.moe_intermediate_size
        spread = weights.new_zeros(len(h), e).scatter(1, chosen, weights)
        gate_up = F.linear(h, layer.gate_up.flatten(0, 1)).view(-1, 2 * f)
        wide = gated(gate_up, spread.flatten()).view(len(h), e * f)
        return F.linear(wide, layer.down.transpose(0, 1).flatten(1)), (spread > 0).sum(0)

    def chosen_experts(self, layer, h, weights, chosen):
        k, flat = chosen.shape[1], chosen.flatten()
        counts = torch.bincount(flat, minlength=self.sizes.num_experts)
        # Rows are gathered expert by expert. Each group is padded with rows of weight zero to a
        # multiple of 64: products prepare themselves for their shape, so shapes have to come back.
        padded = (counts + 63) // 64 * 64
        sizes = padded.tolist()
        order = flat.argsort(stable=True)
        pads_before = (padded - counts).cumsum(0) - (padded - counts)
        slot = torch.arange(len(flat), device=h.device) + pads_before[flat[order]]
        source = slot.new_zeros(sum(sizes)).index_copy(0, slot, order // k)
        weight = weights.new_zeros(sum(sizes)).index_copy(0, slot, weights.flatten()[order])
        slots = torch.empty_like(slot).index_copy(0, order, slot).view(-1, k)

        each = lambda x, w: torch.cat([F.linear(r, m) for r, m in zip(x.split(sizes), w.unbind())])
        # The routed weight goes in before `down`, where rows are narrowest.
        y = each(gated(each(F.embedding(source, h), layer.gate_up), weight), layer.down)
        return F.embedding_bag(slots, y, mode="sum"), counts


def matrix(*dims, scale=0.02, dtype=BF16):
    return torch.nn.Parameter((torch.randn(*dims) * scale).to(dtype))


@torch.compile
def norm(x, w):
    x = x.float()
    return (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * w).to(BF16)


@torch.compile
def norm_rope(x, w, cos, sin):
    x = x.float()
    x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * w
    a, b = x.chunk(2, -1)
    return (x * cos + torch.cat([-b, a], -1) * sin).to(BF16)


@torch.compile(dynamic=True)
def gated(gate_up, weight):
    gate, up = gate_up.float().chunk(2, -1)
    return (F.silu(gate) * up * weight[:, None]).to(BF16)


# ---- data -------------------------------------------------------------------------------------


def tokenise(corpus: Path, out: Path, given: Path | None):
    """Token ids of each domain's training and held-out text, kept in OUT for the next start."""
    target = out / "tokenizer.json"
    if given:
        target.write_bytes(given.read_bytes())
    elif not target.exists():
        train_tokenizer([str(corpus / f"train-{d}.txt") for d in DOMAINS]).save(str(target))
    tokenizer = Tokenizer.from_file(str(target))

    def ids(name):
        kept = out / f"{name}.bin"
        if not kept.exists():
            *ended, rest = (corpus / f"{name}.txt").read_bytes().decode().split(SPECIAL[0])
            documents = [document + SPECIAL[0] for document in ended] + [rest]
            encoded = [np.array(tokenizer.encode(d).ids, dtype=np.uint16) for d in documents]
            np.concatenate(encoded).tofile(kept)
        return np.fromfile(kept, dtype=np.uint16)

    return {d: ids(f"train-{d}") for d in DOMAINS}, {d: ids(f"val-{d}") for d in DOMAINS}


def train_tokenizer(files: list[str]) -> Tokenizer:
    """Byte-level BPE over Qwen2's normaliser and pre-tokeniser."""
    words = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
             r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")  # fmt: skip
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(words), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train(files, trainers.BpeTrainer(
        vocab_size=CONFIG["vocab_size"], special_tokens=SPECIAL, initial_alphabet=alphabet,
    ))  # fmt: skip
    return tokenizer


class Rows:
    """Training rows. A domain's rows start at multiples of the golden ratio, modulo its length:
    any number of them covers the text evenly, and neighbours in time are far apart in it."""

    def __init__(self, texts: dict):
        self.texts, self.drawn = texts, {d: 0 for d in texts}

    def draw(self, count: int, length: int, seed: int):
        chosen = np.random.default_rng(seed).choice(list(DOMAINS), count, p=list(DOMAINS.values()))
        rows = []
        for domain in chosen:
            self.drawn[domain] += 1
            text = self.texts[domain]
            start = int(self.drawn[domain] * 0.6180339887498949 % 1 * (len(text) - length))
            rows.append(text[start : start + length + 1].astype(np.int64))
        return torch.from_numpy(np.stack(rows))


# ---- optimiser --------------------------------------------------------------------------------


class Optimiser:
    """Muon (K. Jordan; scaled as in arXiv 2502.16982) for matrices, Adam for the embedding, routers
    and gains. State lives in shared memory; each process updates its part of the tensors."""

    def __init__(self, model: Model, lr: float, decay: float):
        self.lr, self.decay, self.params = lr, decay, dict(model.named_parameters())
        zeros = lambda n: torch.zeros_like(self.master[n]).share_memory_()
        self.master = {n: p.data.float().clone().share_memory_() for n, p in self.params.items()}
        self.first = {n: zeros(n) for n in self.master}
        by_adam = ("embed", "norm", "router")
        self.second = {n: zeros(n) for n in self.master if n.endswith(by_adam)}
        # Costly tensors first, dealt in turn, so that the processes finish together.
        self.deal = sorted(self.params, key=lambda n: -self.master[n].numel())

    @torch.no_grad()
    def step(self, grads: list[dict], factor: float, step: int, rank: int, size: int):
        for name in self.deal[rank::size]:
            grad = sum(g[name].float() for g in grads) / size
            lr, master, first = self.lr * factor, self.master[name], self.first[name]
            if name in self.second:
                second = self.second[name]
                first.lerp_(grad, 0.1)
                second.lerp_(grad.square(), 0.05)
                scale = (second / (1 - 0.95**step)).sqrt_().add_(1e-8)
                master.sub_(first / scale, alpha=0.6 * lr / (1 - 0.9**step))
            else:
                first.lerp_(grad, 0.05)
                rows, cols = master.shape[-2:]
                rows //= 2 if name.endswith("gate_up") else 1  # two matrices in one tensor
                update = orthogonal(grad.lerp(first, 0.95).view(-1, rows, cols)).view_as(master)
                rms = 0.2 * math.sqrt(max(rows, cols))  # what Adam's updates have
                master.mul_(1 - lr * self.decay).sub_(update.float(), alpha=lr * rms)
            self.params[name].data.copy_(master)


def orthogonal(g):
    """Nearest orthogonal matrices of a batch, by five Newton-Schulz steps in bf16."""
    x = (g / (g.norm(dim=(-2, -1), keepdim=True) + 1e-12)).to(BF16)
    tall = x.shape[-2] > x.shape[-1]
    x = x.transpose(1, 2).contiguous() if tall else x
    for _ in range(5):
        a = x @ x.transpose(1, 2)
        x = torch.baddbmm(x, torch.baddbmm(a, a, a, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return x.transpose(1, 2) if tall else x


# ---- files ------------------------------------------------------------------------------------


def hf_views(model: Model):
    """Hugging Face's tensor names, each with its part of the model."""
    parts = {
        "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
        "self_attn.q_norm": "q_norm", "self_attn.k_norm": "k_norm", "self_attn.q_proj": "q",
        "self_attn.k_proj": "k", "self_attn.v_proj": "v", "self_attn.o_proj": "o",
        "mlp.gate": "router",
    }  # fmt: skip
    tensors = {n: p.detach() for n, p in model.named_parameters()}
    yield "model.embed_tokens.weight", tensors["embed"]
    yield "model.norm.weight", tensors["norm"]
    for i in range(model.sizes.num_hidden_layers):
        for theirs, ours in parts.items():
            yield f"model.layers.{i}.{theirs}.weight", tensors[f"layers.{i}.{ours}"]
        for e in range(model.sizes.num_experts):
            gate, up = tensors[f"layers.{i}.gate_up"][e].chunk(2)
            for name, t in ("gate", gate), ("up", up), ("down", tensors[f"layers.{i}.down"][e]):
                yield f"model.layers.{i}.mlp.experts.{e}.{name}_proj.weight", t


def load_hf(path: Path) -> Model:
    config = CONFIG | json.loads((path / "config.json").read_text())
    config["max_position_embeddings"] = CONFIG["max_position_embeddings"]  # what is trained counts
    model = Model(config)
    stored = load_file(path / "model.safetensors")
    for name, view in hf_views(model):
        view.copy_(stored[name])
    return model


def save_hf(model: Model, losses: dict, out: Path):
    weights = {n: t.to(BF16).cpu().clone() for n, t in hf_views(model)}
    replace(out / "model.safetensors", lambda p: save_file(weights, p, metadata={"format": "pt"}))
    replace(out / "config.json", lambda p: p.write_text(json.dumps(model.config, indent=1)))
    replace(out / "val.json", lambda p: p.write_text(json.dumps(losses, indent=1)))


def replace(path: Path, write):
    """Write beside and rename, so that a reader never sees half a file."""
    beside = path.with_name(path.name + ".new")
    write(beside)
    os.replace(beside, path)


# ---- run --------------------------------------------------------------------------------------


@torch.no_grad()
def held_out(model: Model, val: dict, device) -> dict:
    """Nats a token over the first 20,480 tokens of each domain, in rows of 512."""
    losses = {}
    model.eval()
    for domain, text in val.items():
        ids = torch.from_numpy(text[: VAL_TOKENS + 1].astype(np.int64)).to(device)
        x, y = ids[:-1].view(-1, 8, VAL_ROW), ids[1:].view(-1, 8, VAL_ROW)
        losses[domain] = torch.stack([model(a, b)[0] for a, b in zip(x, y)]).mean().item()
    model.train()
    return losses | {"mean": sum(losses.values()) / len(losses)}


def train(rank, size, barrier, args, model, optimiser, grads, clock, texts, val, state):
    """One of `size` processes; rank 0 also keeps time, evaluates and saves. grads: one dict a
    process; clock: the share of the run that is done; state: what --resume restores but tensors."""
    if rank > 0 and sys.platform == "linux":  # PR_SET_PDEATHSIG: do not outlive rank 0
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    for name, p in model.named_parameters():
        p.grad = grads[rank][name]
    rows, step, tokens, best = Rows(texts), state["step"], state["tokens"], state["best"]
    rows.drawn = dict(state["drawn"])
    begun = last_save = last_log = time.time()
    seconds = lambda: state["seconds"] + time.time() - begun

    def save():
        nonlocal best, last_save
        losses = held_out(model, val, args.device)
        print("held out", {d: round(v, 3) for d, v in losses.items()}, flush=True)
        if losses["mean"] < best:
            best = losses["mean"]
            losses |= {"tokens": tokens, "minutes": round(seconds() / 60, 1)}
            save_hf(model, losses, args.out)
        kept = dict(
            step=step, tokens=tokens, drawn=rows.drawn, seconds=seconds(), best=best,
            master=optimiser.master, first=optimiser.first, second=optimiser.second,
        )  # fmt: skip
        replace(args.out / "checkpoint.pt", lambda p: torch.save(kept, p))
        last_save = time.time()

    while True:
        if rank == 0:
            if time.time() - last_save > args.save_minutes * 60:
                save()
            clock[0] = max(seconds() / 60 / args.minutes, tokens / args.tokens)
        barrier()
        done = clock[0].item()
        if done >= 1:
            break
        length = [n for share, n in ROW_LENGTHS if done >= share][-1]
        batch = rows.draw(args.batch // length, length, step)[rank::size]
        if args.device == "cuda":  # from pinned memory, so that the copy does not wait for the GPU
            batch = batch.pin_memory().to(args.device, non_blocking=True)
        loss, balance, z = model(batch[:, :-1], batch[:, 1:])
        (loss + args.balance * balance + 5e-4 * z).backward()
        step, tokens = step + 1, tokens + args.batch
        barrier()
        # A short rise, then straight to zero (arXiv 2502.15938).
        factor = min(1, (step - state["step"]) / 50) * (1 - done)
        optimiser.step(grads, factor, step, rank, size)
        barrier()
        for grad in grads[rank].values():
            grad.zero_()
        if rank == 0 and time.time() - last_log > 20:
            last_log = time.time()
            print(f"{seconds() / 60:.1f} min, step {step}, {tokens / 1e6:.2f} M tokens, "
                  f"row {length}: loss {loss:.3f}, balance {balance:.2f}", flush=True)  # fmt: skip
    if rank == 0:
        save()


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--corpus", type=Path, required=True)
    p.add_argument("--out", type=Path, required=True)
    p.add_argument("--init", type=Path, help="start from this Hugging Face model")
    p.add_argument("--tokenizer", type=Path, help="use this tokenizer.json instead of training one")
    p.add_argument("--minutes", type=float, default=math.inf, help="over all resumed parts")
    p.add_argument("--tokens", type=float, default=math.inf, help="likewise: what ends first")
    p.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    p.add_argument("--threads", type=int, default=os.cpu_count(), help="processes on a CPU")
    p.add_argument("--batch", type=int, default=8192, help="tokens a step, 1024 x threads x any")
    p.add_argument("--lr", type=float, default=4e-3)
    p.add_argument("--decay", type=float, default=0.05, help="of matrices; 0.3 for many epochs")
    p.add_argument("--dropout", type=float, default=0.0, help="0.1 for many epochs")
    p.add_argument("--balance", type=float, default=0.003, help="weight of the load-balancing loss")
    p.add_argument("--save-minutes", type=float, default=10)
    p.add_argument("--resume", action="store_true", help="continue from OUT/checkpoint.pt")
    args = p.parse_args()

    if args.minutes == args.tokens == math.inf:
        p.error("--minutes or --tokens must say when to end")
    size = args.threads if args.device == "cpu" else 1
    if args.batch % (ROW_LENGTHS[-1][1] * size):
        p.error(f"--batch must be a multiple of {ROW_LENGTHS[-1][1]} x {size} processes")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    args.out.mkdir(parents=True, exist_ok=True)
    texts, val = tokenise(args.corpus, args.out, args.tokenizer)
    start = args.out if args.resume else args.init
    model = load_hf(start) if start else Model(CONFIG)
    model.dropout = args.dropout
    model.to(args.device)
    model.share_memory()
    optimiser = Optimiser(model, args.lr, args.decay)
    state = dict(step=0, tokens=0, drawn={d: 0 for d in DOMAINS}, seconds=0.0, best=math.inf)
    if args.resume:
        state = torch.load(args.out / "checkpoint.pt", map_location=args.device)
        for kept in ("master", "first", "second"):
            for name, t in getattr(optimiser, kept).items():
                t.copy_(state[kept][name])
        for name, q in model.named_parameters():
            q.data.copy_(optimiser.master[name])
    zeros = lambda q: torch.zeros_like(q.data).share_memory_()
    grads = [{n: zeros(q) for n, q in model.named_parameters()} for _ in range(size)]
    clock = torch.zeros(1, dtype=torch.float64).share_memory_()
    print(f"{sum(q.numel() for q in model.parameters()) / 1e6:.1f} M parameters", flush=True)

    # Forked, so that the tensors above are the same memory in every process.
    fork = torch.multiprocessing.get_context("fork")
    common = (fork.Barrier(size).wait, args, model, optimiser, grads, clock, texts, val, state)
    for rank in range(1, size):
        fork.Process(target=train, args=(rank, size, *common), daemon=True).start()
    train(0, size, *common)


if __name__ == "__main__":
    main()
