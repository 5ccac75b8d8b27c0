"""A Qwen3-MoE in numpy, and what a device's predictions are worth: a second implementation to compare with."""

import gguf
import numpy as np
from tokenizers import Regex, Tokenizer, models, pre_tokenizers

QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def silu(x):
    return x / (1 + np.exp(-x))


def norm(x, weight, eps):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight


class Model:
    """A Qwen3-MoE from a GGUF file, in f32; layers are dictionaries of tensors by their GGUF names."""

    def __init__(self, path):
        reader = gguf.GGUFReader(path)
        meta = {key.split(".", 1)[1]: field.contents() for key, field in reader.fields.items() if "." in key}
        if meta["architecture"] != "qwen3moe" or meta["ggml.pre"] != "qwen2":
            raise SystemExit(f"{path}: {meta['architecture']} with {meta['ggml.pre']}, expected qwen3moe with qwen2")
        tensors = {t.name: gguf.dequantize(t.data, t.tensor_type).astype(np.float32) for t in reader.tensors}
        self.embedding, self.output_norm = tensors["token_embd.weight"], tensors["output_norm.weight"]
        self.head = tensors.get("output.weight", self.embedding)
        self.layers = [
            {name.split(".")[2]: t for name, t in tensors.items() if name.startswith(f"blk.{i}.")}
            for i in range(meta["block_count"])
        ]
        self.heads, self.kv_heads = meta["attention.head_count"], meta["attention.head_count_kv"]
        self.head_size, self.used = meta["attention.key_length"], meta["expert_used_count"]
        self.eps, self.base = meta["attention.layer_norm_rms_epsilon"], meta["rope.freq_base"]
        vocabulary = {token: i for i, token in enumerate(meta["ggml.tokens"])}
        merges = [tuple(merge.split(" ")) for merge in meta["ggml.merges"]]
        self.tokenizer = Tokenizer(models.BPE(vocabulary, merges))
        split = pre_tokenizers.Split(Regex(QWEN2), "isolated")
        bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        self.tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, bytes_])

    def tokens(self, text):
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def rope(self, x):
        rows, half = x.shape[-2], x.shape[-1] // 2
        angle = np.arange(rows)[:, None] * self.base ** (-np.arange(half) / half)
        cos, sin = np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)
        a, b = x[..., :half], x[..., half:]
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)

    def attend(self, layer, x):
        """[windows, rows, width] to the same, without the residual."""
        h = norm(x, layer["attn_norm"], self.eps)

        def project(name, heads):
            return (h @ layer[name].T).reshape(*x.shape[:2], heads, self.head_size).transpose(0, 2, 1, 3)

        q = self.rope(norm(project("attn_q", self.heads), layer["attn_q_norm"], self.eps))
        k = self.rope(norm(project("attn_k", self.kv_heads), layer["attn_k_norm"], self.eps))
        k, v = (np.repeat(t, self.heads // self.kv_heads, 1) for t in (k, project("attn_v", self.kv_heads)))
        scores = q @ k.transpose(0, 1, 3, 2) / np.float32(np.sqrt(self.head_size))
        scores[..., np.triu(np.ones(scores.shape[-2:], bool), 1)] = -np.inf
        scores = np.exp(scores - scores.max(-1, keepdims=True))
        scores /= scores.sum(-1, keepdims=True)
        return (scores @ v).transpose(0, 2, 1, 3).reshape(*x.shape[:2], -1) @ layer["attn_output"].T

    def route(self, layer, h):
        """Each row's experts and their weights, [rows, used]."""
        logits = h @ layer["ffn_gate_inp"].T
        chosen = np.argpartition(-logits, self.used - 1, -1)[:, : self.used]
        weights = np.exp(np.take_along_axis(logits, chosen, -1) - logits.max(-1, keepdims=True))
        return chosen, weights / weights.sum(-1, keepdims=True)

    def exact(self, i, e):
        layer = self.layers[i]
        return feed_forward(*(layer[f"ffn_{part}_exps"][e] for part in ("gate", "up", "down")))

    def forward(self, tokens, expert=None, seen=None):
        """Logits [windows, rows, vocabulary]; `expert(i, e)` is the function that runs, `seen` collects what each
        layer's experts saw: inputs, choices, weights, and the residual stream's energy behind the layer."""
        expert, x = expert or self.exact, self.embedding[tokens]
        for i, layer in enumerate(self.layers):
            x = x + self.attend(layer, x)
            h = norm(x, layer["ffn_norm"], self.eps).reshape(-1, x.shape[-1])
            chosen, weights = self.route(layer, h)
            out = np.zeros_like(h)
            for e in np.unique(chosen):
                row, place = np.nonzero(chosen == e)
                out[row] += weights[row, place, None] * expert(i, e)(h[row])
            x = x + out.reshape(x.shape)
            if seen is not None:
                seen[i].append((h, chosen, weights, (x.astype(np.float64) ** 2).sum()))
        return norm(x, self.output_norm, self.eps) @ self.head.T


def feed_forward(gate, up, down):
    return lambda x: (silu(x @ gate.T) * (x @ up.T)) @ down.T


def log_softmax(logits):
    logits = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def compare(full, device, tokens):
    """The meter's figures (docs/meter.md): perplexity ratio, KL, top-1 agreement, acceptance."""
    full, device = (log_softmax(logits[:, :-1]) for logits in (full, device))
    said = np.take_along_axis(full - device, tokens[:, 1:, None], -1)
    p, q = np.exp(full), np.exp(device)
    kl, accepted = (p * (full - device)).sum(-1).mean(), np.minimum(p, q).sum(-1).mean()
    return np.exp(said.mean()), kl, (full.argmax(-1) == device.argmax(-1)).mean(), accepted
