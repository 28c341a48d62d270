"""Writes a Mixtral-shaped model folder as GGUF, so that llama.cpp can be measured with the same weights.

Rows of queries and keys are permuted, because llama.cpp rotates neighbours where moejax rotates halves. Routers and
norms are float32; all other tensors are of one type, as `llama-quantize --pure` writes them.
"""

from pathlib import Path

import gguf
import numpy as np
from gguf.quants import quantize
from tokenizers import Tokenizer

from benchmarks.published_model import check_mixtral
from moejax.checkpoint.checkpoint import load_params
from moejax.config.model_config import ModelConfig
from moejax.config.params import Layer

TYPES = {
    "float32": gguf.GGMLQuantizationType.F32,
    "bfloat16": gguf.GGMLQuantizationType.BF16,
    "Q8_0": gguf.GGMLQuantizationType.Q8_0,
    "Q4_0": gguf.GGMLQuantizationType.Q4_0,
}
_PLAIN, _CONTROL = 1, 3


def write_gguf(folder: Path, target: Path, form: str) -> None:
    """Write the model of `folder` to `target` in a form of TYPES. Raises ConfigError for a model that has more than a
    Mixtral, or less."""
    cfg, params = ModelConfig.load(folder), load_params(folder)
    check_mixtral(cfg, params)
    writer = gguf.GGUFWriter(target, "llama")
    _write_config(writer, cfg)
    _write_tokens(writer, Tokenizer.from_file(str(folder / "tokenizer.json")), cfg)

    def add(name: str, values: np.ndarray, *, narrow: bool = True) -> None:
        wide = np.ascontiguousarray(values, np.float32)
        kind = TYPES[form] if narrow else gguf.GGMLQuantizationType.F32
        writer.add_tensor(f"{name}.weight", quantize(wide, kind), raw_dtype=kind)

    add("token_embd", params.embed)
    add("output", params.embed if params.head is None else params.head)
    add("output_norm", params.final_norm, narrow=False)
    (stacked,) = params.segments[0]
    for i in range(cfg.n_layers):
        _write_layer(add, f"blk.{i}", stacked, i, cfg)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _write_layer(add, at: str, stacked: Layer, i: int, cfg: ModelConfig) -> None:
    N, K, H = cfg.n_heads, cfg.n_kv_heads, cfg.d_head
    q, k, v = np.split(stacked.qkv[i], np.cumsum([N * H, K * H]))
    add(f"{at}.attn_q", _neighbours(q, N))
    add(f"{at}.attn_k", _neighbours(k, K))
    add(f"{at}.attn_v", v)
    add(f"{at}.attn_output", stacked.out[i])
    add(f"{at}.attn_norm", stacked.attention_norm[i], narrow=False)
    add(f"{at}.ffn_norm", stacked.ffn_norm[i], narrow=False)
    assert stacked.moe is not None
    gate, up = np.split(stacked.moe.experts.gate_up[i], 2, axis=1)
    add(f"{at}.ffn_gate_inp", stacked.moe.router[i], narrow=False)
    add(f"{at}.ffn_gate_exps", gate)
    add(f"{at}.ffn_up_exps", up)
    add(f"{at}.ffn_down_exps", stacked.moe.experts.down[i])


def _neighbours(w: np.ndarray, heads: int) -> np.ndarray:
    """Rows of each head from (member, pair) order to (pair, member)."""
    rows, width = w.shape
    return w.reshape(heads, 2, rows // heads // 2, width).swapaxes(1, 2).reshape(rows, width)


def _write_config(writer: gguf.GGUFWriter, cfg: ModelConfig) -> None:
    assert cfg.moe is not None
    writer.add_name(cfg.name)
    writer.add_context_length(cfg.max_context)
    writer.add_embedding_length(cfg.d_model)
    writer.add_block_count(cfg.n_layers)
    writer.add_feed_forward_length(cfg.moe.d_expert)
    writer.add_head_count(cfg.n_heads)
    writer.add_head_count_kv(cfg.n_kv_heads)
    writer.add_rope_dimension_count(cfg.d_head)
    writer.add_rope_freq_base(cfg.rope_base)
    writer.add_layer_norm_rms_eps(cfg.norm_eps)
    writer.add_vocab_size(cfg.vocab_size)
    writer.add_expert_count(cfg.moe.experts)
    writer.add_expert_used_count(cfg.moe.experts_per_token)


def _write_tokens(writer: gguf.GGUFWriter, tokenizer: Tokenizer, cfg: ModelConfig) -> None:
    tokens = [tokenizer.id_to_token(i) for i in range(cfg.vocab_size)]
    stop = cfg.stop_tokens[0]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([_CONTROL if i in cfg.stop_tokens else _PLAIN for i in range(cfg.vocab_size)])
    writer.add_token_merges(["\u0120 \u0120"])  # llama.cpp wants one; it makes no token of the vocabulary
    writer.add_bos_token_id(stop)
    writer.add_eos_token_id(stop)
    writer.add_add_bos_token(False)
