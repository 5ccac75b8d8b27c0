"""Makes tests/fixtures/{olmoe,qwen2moe,qwen3moe,mixtral}: tiny random models and the logits that they must give.

Parity with an oracle that shares no code with us: Hugging Face transformers builds each model with random weights and
computes its logits in f32; this script writes the same weights as a GGUF with the names and layouts that llama.cpp's
converter makes (conversion/{olmo,qwen,llama}.py). Each directory gets model.gguf, tokens.json (ids) and logits.f32
(little-endian [tokens, vocab]).

    python tools/make_fixtures.py --out tests/fixtures
"""

import argparse
import json
import logging
import math
from pathlib import Path

import convert_demo
import gguf
import numpy as np
import torch
import transformers

N_TOKENS = 24
# GPT-2's spelling of bytes: printable ones as themselves, the others from U+0100 on (openai/gpt-2, src/encoder.py).
PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
BYTES = [chr(b) for b in PRINTABLE] + [chr(256 + i) for i in range(256 - len(PRINTABLE))]
# Every byte and one merge: the smallest byte-level tokenizer that can spell any text.
VOCAB = ["<|endoftext|>", *BYTES, "th"]

COMMON = dict(
    vocab_size=len(VOCAB), hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
    max_position_embeddings=128, bos_token_id=0, eos_token_id=0, pad_token_id=None,
)  # fmt: skip

# Between them: full-width and per-head q/k norms, q/k/v biases, a gated shared expert, grouped queries, a head size that
# is not hidden/heads, tied embeddings, both rotations, and gates that normalise and that do not.
MODELS = {
    "olmoe": dict(
        arch="olmoe", pre="olmo", config=transformers.OlmoeConfig, rope_theta=1e4,
        sizes=dict(num_key_value_heads=4, intermediate_size=32, num_experts=8, num_experts_per_tok=4,
                   norm_topk_prob=False, rms_norm_eps=1e-5),
    ),
    "qwen2moe": dict(
        arch="qwen2moe", pre="qwen2", config=transformers.Qwen2MoeConfig, rope_theta=1e6,
        sizes=dict(num_key_value_heads=2, intermediate_size=96, moe_intermediate_size=32,
                   shared_expert_intermediate_size=24, num_experts=8, num_experts_per_tok=4,
                   norm_topk_prob=False, rms_norm_eps=1e-6),
    ),
    "qwen3moe": dict(
        arch="qwen3moe", pre="qwen2", config=transformers.Qwen3MoeConfig, rope_theta=1e6,
        sizes=dict(num_key_value_heads=2, head_dim=24, intermediate_size=96, moe_intermediate_size=32, num_experts=8,
                   num_experts_per_tok=3, norm_topk_prob=True, rms_norm_eps=1e-6, tie_word_embeddings=True),
    ),
    "mixtral": dict(
        arch="llama", pre="llama-bpe", config=transformers.MixtralConfig, rope_theta=1e6,
        sizes=dict(num_key_value_heads=2, intermediate_size=32, num_local_experts=8, num_experts_per_tok=2,
                   rms_norm_eps=1e-5),
    ),
}  # fmt: skip

# The converter's names and those of a shared expert; the experts are split by hand.
LAYER_NAMES = convert_demo.LAYER_NAMES | {
    "mlp.shared_expert.gate_proj": "ffn_gate_shexp",
    "mlp.shared_expert.up_proj": "ffn_up_shexp",
    "mlp.shared_expert.down_proj": "ffn_down_shexp",
    "mlp.shared_expert_gate": "ffn_gate_inp_shexp",
}


def build(spec):
    """The transformers model with random weights, and its config."""
    rope = dict(rope_type="default", rope_theta=spec["rope_theta"])
    config = spec["config"](**COMMON, **spec["sizes"], rope_parameters=rope)
    config._attn_implementation = "eager"
    config._experts_implementation = "eager"
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    # Tied embeddings are the output matrix too, which takes a smaller scale.
    stream = 1.5 / math.sqrt(config.hidden_size) if config.tie_word_embeddings else 1.0
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(random_weight(name, parameter.shape, stream))
    return model, config


def random_weight(name, shape, stream):
    """Scales that keep the residual stream at `stream`, and the routing and the logits of order one to ten.

    Attention is a quarter of the stream: enough that a wrong rotation shows a hundred times over, little enough that an
    f16 KV cache stays within the tolerance of a test that is about formulas.
    """
    noise = torch.randn(shape)
    if "norm" in name:
        return 1 + 0.2 * noise
    if name.endswith(".bias"):
        return 0.3 * noise
    if "embed_tokens" in name:
        return stream * noise
    gains = {"gate.weight": 2.0, "o_proj": 0.25 * stream, "down_proj": 2.0 * stream}
    gain = next((gain for part, gain in gains.items() if part in name), 1.0)
    return gain * noise / math.sqrt(shape[-1])


def smallest_margin(model, ids):
    """How far the least certain choice of experts is from going the other way, in router logits."""
    routers, margins = [m for n, m in model.named_modules() if n.endswith("mlp.gate")], []
    k = model.config.num_experts_per_tok

    def measure(router, inputs, _output):
        scores = inputs[0].reshape(-1, router.weight.shape[1]) @ router.weight.T
        best = scores.sort(descending=True).values
        margins.append((best[:, k - 1] - best[:, k]).min().item())

    hooks = [router.register_forward_hook(measure) for router in routers]
    with torch.no_grad():
        model(ids)
    for hook in hooks:
        hook.remove()
    return min(margins)


def write_gguf(path, spec, config, state):
    writer = gguf.GGUFWriter(path, spec["arch"])
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(f"Tiny random {path.parent.name}")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(spec["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_expert_count(n_experts(config))
    writer.add_expert_used_count(config.num_experts_per_tok)
    if spec["arch"] == "llama":
        writer.add_vocab_size(config.vocab_size)
        writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    if spec["arch"] == "qwen3moe":
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    if spec["arch"] in ("qwen2moe", "qwen3moe"):
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    if spec["arch"] == "qwen2moe":
        writer.add_expert_shared_feed_forward_length(config.shared_expert_intermediate_size)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    write_tokenizer(writer, spec["pre"])
    for name, tensor in tensors(spec["arch"], config, state):
        writer.add_tensor(name, np.ascontiguousarray(tensor.float().numpy()))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def n_experts(config):
    return getattr(config, "num_local_experts", None) or config.num_experts


def write_tokenizer(writer, pre):
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(VOCAB)
    writer.add_token_types([gguf.TokenType.CONTROL] + [gguf.TokenType.NORMAL] * (len(VOCAB) - 1))
    writer.add_token_merges(["t h"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    writer.add_add_bos_token(False)


def tensors(arch, config, state):
    """Yields (GGUF name, tensor) in llama.cpp's layout."""
    yield "token_embd.weight", state["model.embed_tokens.weight"]
    for layer in range(config.num_hidden_layers):
        source, target = f"model.layers.{layer}.", f"blk.{layer}."
        for hf_name, name in LAYER_NAMES.items():
            for kind in ("weight", "bias"):
                if (tensor := state.get(f"{source}{hf_name}.{kind}")) is None:
                    continue
                if arch == "llama" and name in ("attn_q", "attn_k"):
                    tensor = permute(tensor, config.num_attention_heads if name == "attn_q" else config.num_key_value_heads)
                # The shared expert's gate is one row, which llama.cpp keeps as a vector.
                yield f"{target}{name}.{kind}", tensor.squeeze(0) if name == "ffn_gate_inp_shexp" else tensor
        gate, up = state[f"{source}mlp.experts.gate_up_proj"].chunk(2, dim=1)
        yield f"{target}ffn_gate_exps.weight", gate
        yield f"{target}ffn_up_exps.weight", up
        yield f"{target}ffn_down_exps.weight", state[f"{source}mlp.experts.down_proj"]
    yield "output_norm.weight", state["model.norm.weight"]
    if not config.tie_word_embeddings:
        yield "output.weight", state["lm_head.weight"]


def permute(weight, n_heads):
    """From halves rotated together (NEOX) to neighbours rotated together (NORM): conversion/llama.py, `permute`."""
    rows = weight.shape[0]
    return weight.reshape(n_heads, 2, rows // n_heads // 2, -1).swapaxes(1, 2).reshape(weight.shape)


def make(name, out, margin):
    """Takes the first seed whose routing no rounding can flip, so that a failed parity test means a wrong formula."""
    spec = MODELS[name]
    for seed in range(1000):
        torch.manual_seed(seed)
        model, config = build(spec)
        ids = torch.randint(1, config.vocab_size, (1, N_TOKENS))
        if (found := smallest_margin(model, ids)) >= margin:
            break
    with torch.no_grad():
        logits = model(ids).logits[0].numpy().astype("<f4")
    directory = out / name
    directory.mkdir(parents=True, exist_ok=True)
    write_gguf(directory / "model.gguf", spec, config, model.state_dict())
    (directory / "tokens.json").write_text(json.dumps(ids[0].tolist()) + "\n")
    logits.tofile(directory / "logits.f32")
    size = sum(f.stat().st_size for f in directory.iterdir()) / 1000
    print(f"{name}: seed {seed}, margin {found:.4f}, logits std {logits.std():.2f} max {abs(logits).max():.2f}, {size:.0f} kB")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="directory of the fixtures")
    parser.add_argument("--margin", type=float, default=0.02, help="smallest gap between chosen and unchosen router logits")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    logging.getLogger("gguf").setLevel(logging.ERROR)
    for name in MODELS:
        make(name, args.out, args.margin)


if __name__ == "__main__":
    main()
