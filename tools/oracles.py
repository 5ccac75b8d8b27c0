"""Logits of a GGUF model by two programs that share no code with us, and how two sets of logits differ.

Used by compare_logits.py and make_demo_fixtures.py. llama.cpp is reached through llama-cpp-python's low-level binding;
to use a libllama that is built already, set LLAMA_CPP_LIB_PATH to its directory.
"""

import contextlib
import ctypes
import os
from pathlib import Path

import gguf
import numpy as np
from convert_demo import LAYER_NAMES


def llama_cpp_logits(model: Path, ids: list[int], kv: str = "f32") -> np.ndarray:
    """[tokens, vocab] by llama.cpp in one batch, with keys and values kept in `kv` (its own default is f16)."""
    import llama_cpp

    llama_cpp.llama_backend_init()
    with quiet():
        model_params = llama_cpp.llama_model_default_params()
        model_params.n_gpu_layers = 0
        handle = llama_cpp.llama_model_load_from_file(str(model).encode(), model_params)
        if not handle:
            raise SystemExit(f"{model}: llama.cpp cannot load it")
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = params.n_batch = params.n_ubatch = max(len(ids), 32)
        params.type_k = params.type_v = {"f32": llama_cpp.GGML_TYPE_F32, "f16": llama_cpp.GGML_TYPE_F16}[kv]
        params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        context = llama_cpp.llama_init_from_model(handle, params)
    batch = llama_cpp.llama_batch_init(len(ids), 0, 1)
    batch.n_tokens = len(ids)
    for i, token in enumerate(ids):
        batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = token, i, 1, 0, 1
    if llama_cpp.llama_decode(context, batch) != 0:
        raise SystemExit(f"{model}: llama.cpp cannot decode")
    n_vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(handle))
    logits = np.ctypeslib.as_array(llama_cpp.llama_get_logits(context), (len(ids), n_vocab)).copy()
    with quiet():
        llama_cpp.llama_batch_free(batch)
        llama_cpp.llama_free(context)
        llama_cpp.llama_model_free(handle)
    return logits


@contextlib.contextmanager
def quiet():
    """llama.cpp reports on loading and freeing by writing to file descriptor 2."""
    saved, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        yield
    finally:
        ctypes.CDLL(None).fflush(None)
        os.dup2(saved, 2)
        os.close(saved)
        os.close(null)


def transformers_logits(hf: Path, ids: list[int], weights_of: Path | None = None, **config) -> np.ndarray:
    """[tokens, vocab] by transformers in f32; `weights_of` puts a GGUF's dequantised weights in place of the original, `config`
    other values in place of its configuration's."""
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(
        hf, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager", **config
    ).eval()
    if weights_of:
        with torch.no_grad():
            for name, tensor in qwen3moe_state(weights_of).items():
                model.get_parameter(name).copy_(torch.from_numpy(tensor.copy()))
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].numpy()


def qwen3moe_state(model: Path) -> dict[str, np.ndarray]:
    """A qwen3moe GGUF's tensors under the names of transformers 5, which fuses an expert's gate and up matrices."""
    tensors = {t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in gguf.GGUFReader(model).tensors}
    state = {
        "model.embed_tokens.weight": tensors["token_embd.weight"],
        "model.norm.weight": tensors["output_norm.weight"],
    }
    if "output.weight" in tensors:
        state["lm_head.weight"] = tensors["output.weight"]
    for layer in range(sum(name.endswith("attn_norm.weight") for name in tensors)):
        source, target = f"blk.{layer}.", f"model.layers.{layer}."
        for hf_name, name in LAYER_NAMES.items():
            state[f"{target}{hf_name}.weight"] = tensors[f"{source}{name}.weight"]
        gate_up = [tensors[f"{source}ffn_{part}_exps.weight"] for part in ("gate", "up")]
        state[f"{target}mlp.experts.gate_up_proj"] = np.concatenate(gate_up, axis=1)
        state[f"{target}mlp.experts.down_proj"] = tensors[f"{source}ffn_down_exps.weight"]
    return state


def differences(ours: np.ndarray, theirs: np.ndarray) -> tuple[float, float, float]:
    """Mean KL(theirs || ours) in nats a token, share of tokens with the same best token, largest absolute difference."""
    p, q = log_softmax(theirs), log_softmax(ours)
    kl = (np.exp(p) * (p - q)).sum(axis=1).mean()
    return kl, (ours.argmax(axis=1) == theirs.argmax(axis=1)).mean(), np.abs(ours - theirs).max()


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
