"""Read a dense Llama-layout model from a GGUF file: configuration, parameters, tokenizer and chat template.

GGUF differs from `Params`: query and key rows are permuted so that neighbours rotate against each other (undone here,
since our rope rotates halves), projections are separate (fused here), weights may be quantised (dequantised to float32
here). Weights are `[out, in]` in both.
"""

import dataclasses
from pathlib import Path

import gguf
import jax
import numpy as np
from gguf.quants import dequantize
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from moejax.checkpoint.manifest import CheckpointError
from moejax.config.model_config import ModelConfig
from moejax.config.params import FeedForward, Layer, Params

CONTROL = 3
"""GGUF's type of tokens that are matched as wholes and are no text."""


@dataclasses.dataclass(frozen=True)
class GGUFModel:
    """A dense model as a GGUF file describes it, parameters in float32."""

    cfg: ModelConfig
    params: Params
    tokenizer: Tokenizer
    chat_template: str


def read_gguf(path: Path, name: str) -> GGUFModel:
    """Read a GGUF file of a Llama-layout model with a byte-level BPE.

    Raises CheckpointError when the file is no such model, is cut short, or lacks a tensor.
    """
    try:
        reader = gguf.GGUFReader(path)
        fields = {f.name: f.contents() for f in reader.fields.values()}
        tensors = {t.name: t for t in reader.tensors}
        cfg = _config(fields, name, tied="output.weight" not in tensors)
        arrays = _Arrays(tensors)
        return GGUFModel(cfg, _params(arrays, cfg), _tokenizer(fields), fields.get("tokenizer.chat_template", ""))
    except KeyError as error:
        raise CheckpointError(f"{path} lacks {error}: it is no Llama-layout model with a BPE.") from error
    except (ValueError, OSError, IndexError) as error:
        raise CheckpointError(f"{path} cannot be read as GGUF: {error}") from error


class _Arrays:
    """Tensors by name, widened to float32 when asked for."""

    def __init__(self, tensors: dict) -> None:
        self._tensors = tensors

    def __call__(self, name: str) -> np.ndarray:
        tensor = self._tensors[name]
        return np.asarray(dequantize(tensor.data, tensor.tensor_type), np.float32)


def _config(fields: dict, name: str, tied: bool) -> ModelConfig:
    family = fields["general.architecture"]
    if family != "llama":
        raise ValueError(f"architecture is {family!r}; only 'llama' is known")
    heads, width = fields["llama.attention.head_count"], fields["llama.embedding_length"]
    return ModelConfig(
        name=name,
        vocab_size=len(fields["tokenizer.ggml.tokens"]),
        d_model=width,
        n_layers=fields["llama.block_count"],
        n_heads=heads,
        n_kv_heads=fields["llama.attention.head_count_kv"],
        d_head=fields.get("llama.rope.dimension_count", width // heads),
        d_ff=fields["llama.feed_forward_length"],
        rope_base=fields["llama.rope.freq_base"],
        norm_eps=round(fields["llama.attention.layer_norm_rms_epsilon"], 12),
        tied_head=tied,
        max_context=fields["llama.context_length"],
        bos_token=fields["tokenizer.ggml.bos_token_id"] if fields.get("tokenizer.ggml.add_bos_token") else None,
        stop_tokens=tuple(sorted({fields["tokenizer.ggml.eos_token_id"], *_end_of_text(fields)})),
    )


def _end_of_text(fields: dict) -> list[int]:
    return [i for i, t in enumerate(fields["tokenizer.ggml.tokens"][:64]) if t == "<|endoftext|>"]


def _params(arrays: _Arrays, cfg: ModelConfig) -> Params:
    def layer(i: int) -> Layer:
        at = f"blk.{i}."
        q, k, v = (arrays(f"{at}attn_{x}.weight") for x in "qkv")
        gate, up = arrays(f"{at}ffn_gate.weight"), arrays(f"{at}ffn_up.weight")
        return Layer(
            attention_norm=arrays(f"{at}attn_norm.weight"),
            qkv=np.concatenate([_halves(q, cfg.n_heads), _halves(k, cfg.n_kv_heads), v]),
            out=arrays(f"{at}attn_output.weight"),
            ffn_norm=arrays(f"{at}ffn_norm.weight"),
            ffn=FeedForward(np.concatenate([gate, up]), arrays(f"{at}ffn_down.weight")),
            moe=None,
        )

    return Params(
        embed=arrays("token_embd.weight"),
        final_norm=arrays("output_norm.weight"),
        head=None if cfg.tied_head else arrays("output.weight"),
        segments=((stack_layers([layer(i) for i in range(cfg.n_layers)]),),),
    )


def stack_layers(layers: list[Layer]) -> Layer:
    """Layers of one kind as one, each leaf stacked over repeats."""
    return jax.tree.map(lambda *leaves: np.stack(leaves), *layers)


def _halves(w: np.ndarray, heads: int) -> np.ndarray:
    """Rows of each head from (pair, member) order to (member, pair): undoes llama.cpp's permutation."""
    rows, width = w.shape
    return w.reshape(heads, rows // heads // 2, 2, width).swapaxes(1, 2).reshape(rows, width)


def _tokenizer(fields: dict) -> Tokenizer:
    """The tokenizer as Hugging Face publishes it: digits apart, then byte-level BPE."""
    if fields["tokenizer.ggml.model"] != "gpt2" or fields["tokenizer.ggml.pre"] != "smollm":
        kind = f"{fields['tokenizer.ggml.model']}/{fields['tokenizer.ggml.pre']}"
        raise ValueError(f"tokenizer is {kind}; only gpt2/smollm is known")
    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    merges = [tuple(m.split(" ")) for m in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=merges))
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    control = [t for t, kind in zip(tokens, types, strict=True) if kind == CONTROL]
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in control])
    return tokenizer
