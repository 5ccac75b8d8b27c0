"""Converts a Qwen3-MoE model in Hugging Face layout to GGUF.

llama.cpp's own converter recognises only tokenizers that it knows by hash; the demo model trained its own. This script
recognises the pre-tokenizer by its expression, and is short enough to be read as the definition of the file. It takes
every size from `config.json`, so that it converts any model of this shape.

    python tools/convert_demo.py --hf DIR --out models/demo.gguf --name NAME --license LICENSE
"""

import argparse
import json
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type
from safetensors.torch import load_file

# The text that the demo model saw is plain prose and code with <|endoftext|> between documents, never a dialogue, so
# the chat template hands it the messages as paragraphs instead of role markers that it has no embedding for.
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['content'] }}"
    "{% if not loop.last or add_generation_prompt %}{{ '\\n\\n' }}{% endif %}{% endfor %}"
)

QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# Hugging Face name -> GGUF name, inside `model.layers.N.` -> `blk.N.`
LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate": "ffn_gate_inp",
}


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hf", type=Path, required=True, help="directory with config.json, tokenizer.json, *.safetensors")
    parser.add_argument("--out", type=Path, required=True, help="GGUF file to write")
    parser.add_argument("--type", choices=["q8_0", "f16", "bf16", "f32"], default="q8_0", help="type of the matrices")
    parser.add_argument("--name", default="Outrigger demo", help="general.name")
    parser.add_argument("--license", default="apache-2.0", help="general.license, an SPDX id")
    parser.add_argument("--description", default="", help="general.description")
    return parser.parse_args()


def write_metadata(writer, config, args):
    """The keys that llama.cpp's converter writes for Qwen3MoeForCausalLM."""
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(args.name)
    writer.add_license(args.license)
    if args.description:
        writer.add_description(args.description)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(rope_base(config))
    writer.add_expert_count(config["num_experts"])
    writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    # llama.cpp normalises the gate's weights of every `qwen3moe`: another setting could not be told to it.
    if not config["norm_topk_prob"]:
        raise SystemExit("config.json: norm_topk_prob is false; GGUF's qwen3moe always normalises")
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{args.type.upper()}" if args.type != "f32" else "ALL_F32"])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def rope_base(config):
    """`rope_theta` moved into `rope_parameters` with transformers 5."""
    return config.get("rope_theta") or config["rope_parameters"]["rope_theta"]


def pre_tokenizer_name(tokenizer):
    """llama.cpp's name for how `tokenizer.json` cuts text before BPE."""
    pre = tokenizer["pre_tokenizer"]
    steps = pre["pretokenizers"] if pre["type"] == "Sequence" else [pre]
    splits = [step["pattern"].get("Regex") for step in steps if step["type"] == "Split"]
    if splits == [QWEN2_SPLIT] and not steps[-1].get("use_regex"):
        return "qwen2"
    if len(steps) == 1 and pre["type"] == "ByteLevel" and pre["use_regex"] and not pre["add_prefix_space"]:
        return "gpt-2"
    raise SystemExit(f"tokenizer.json: pre_tokenizer is neither Qwen2's nor GPT-2's: {json.dumps(pre)}")


def write_tokenizer(writer, config, tokenizer):
    """A byte-level BPE from `tokenizer.json`, padded to the model's vocabulary."""
    model = tokenizer["model"]
    if model["type"] != "BPE":
        raise SystemExit(f"tokenizer.json: model type {model['type']}, expected BPE")
    n_vocab = config["vocab_size"]
    tokens = [f"[PAD{i}]" for i in range(n_vocab)]
    types = [gguf.TokenType.UNUSED] * n_vocab
    for token, i in model["vocab"].items():
        tokens[i], types[i] = token, gguf.TokenType.NORMAL
    for added in tokenizer["added_tokens"]:
        tokens[added["id"]] = added["content"]
        types[added["id"]] = gguf.TokenType.CONTROL if added["special"] else gguf.TokenType.USER_DEFINED
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]

    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre_tokenizer_name(tokenizer))
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(merges)
    writer.add_bos_token_id(config["bos_token_id"])
    writer.add_eos_token_id(config["eos_token_id"])
    writer.add_add_bos_token(False)
    writer.add_chat_template(CHAT_TEMPLATE)


def tensors(weights, config):
    """Yields (GGUF name, f32 array), the experts of a layer stacked into one array with the expert slowest."""
    yield "token_embd.weight", weights["model.embed_tokens.weight"]
    for layer in range(config["num_hidden_layers"]):
        source, target = f"model.layers.{layer}.", f"blk.{layer}."
        for hf_name, name in LAYER_NAMES.items():
            yield f"{target}{name}.weight", weights[f"{source}{hf_name}.weight"]
        for part in ("gate", "up", "down"):
            experts = [weights[f"{source}mlp.experts.{e}.{part}_proj.weight"] for e in range(config["num_experts"])]
            yield f"{target}ffn_{part}_exps.weight", np.stack(experts)
    yield "output_norm.weight", weights["model.norm.weight"]
    if not config.get("tie_word_embeddings", False):
        yield "output.weight", weights["lm_head.weight"]


def tensor_type(name, array, matrix_type):
    """Norms and the router's matrix stay F32: they are small, and routing is where rounding shows most."""
    return Type.F32 if array.ndim == 1 or "ffn_gate_inp" in name else matrix_type


def main():
    args = parse_args()
    config = json.loads((args.hf / "config.json").read_text())
    tokenizer = json.loads((args.hf / "tokenizer.json").read_text())
    if config["model_type"] != "qwen3_moe":
        raise SystemExit(f"config.json: model_type {config['model_type']}, expected qwen3_moe")
    weights = {}
    for shard in sorted(args.hf.glob("*.safetensors")):
        weights |= {name: tensor.float().numpy() for name, tensor in load_file(shard).items()}

    writer = gguf.GGUFWriter(args.out, "qwen3moe")
    write_metadata(writer, config, args)
    write_tokenizer(writer, config, tokenizer)
    matrix_type = Type[args.type.upper()]
    for name, array in tensors(weights, config):
        ty = tensor_type(name, array, matrix_type)
        writer.add_tensor(name, gguf.quants.quantize(array, ty), raw_dtype=ty)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    print(f"{args.out}: {args.out.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
