"""What nearly all families share with Llama: the plain fields of config.json and the plain tensor names."""

from typing import Any

from moejax.config import ModelConfig
from moejax.families.family import Names
from moejax.families.fields import Fields
from moejax.families.rotary import read_rope
from moejax.families.source import Halves, Rows

LAYER = "model.layers.{layer}."
ATTENTION, MLP = LAYER + "self_attn.", LAYER + "mlp."


def read_decoder(
    f: Fields,
    *,
    rope_base: float = 10_000.0,
    norm_eps: float = 1e-6,
    d_head: int | None = None,
    rotated: int | None = None,
    partial: float = 1.0,
) -> dict[str, Any]:
    """Sizes, norm, rotary embedding, context and stop tokens.

    `rope_base`, `norm_eps` and `partial` (the part of each head that is rotated) are the family's defaults. `d_head`
    and `rotated` are given by families that spell them in their own way.
    """
    f.only(hidden_act="silu", pretraining_tp=1)
    heads = f.integer("num_attention_heads")
    d_head = d_head or read_d_head(f)
    context = f.integer("max_position_embeddings")
    served = context if f.context is None else f.context
    if served > context:
        raise f.error(f"max_position_embeddings is {context}; a context of {served} cannot be served")
    return {
        "vocab_size": f.integer("vocab_size"),
        "d_model": f.integer("hidden_size"),
        "n_layers": f.integer("num_hidden_layers"),
        "n_heads": heads,
        "n_kv_heads": f.integer("num_key_value_heads", heads),
        "d_head": d_head,
        "d_ff": f.integer("intermediate_size"),
        "norm_eps": f.number("rms_norm_eps", norm_eps),
        "tied_head": f.flag("tie_word_embeddings", False),
        "max_context": served,
        "stop_tokens": read_stop_tokens(f),
        **read_rope(f, rotated or d_head, partial=partial, base=rope_base, published=context, served=served),
    }


def read_d_head(f: Fields) -> int:
    """`head_dim`, or an even share of the hidden size."""
    if f.has("head_dim"):
        return f.integer("head_dim")
    size, heads = f.integer("hidden_size"), f.integer("num_attention_heads")
    if size % heads:
        raise f.error(f"hidden_size {size} is no multiple of num_attention_heads {heads}, and head_dim is missing")
    return size // heads


def read_stop_tokens(f: Fields) -> tuple[int, ...]:
    """`eos_token_id`, one or several."""
    if isinstance(f.values.get("eos_token_id"), list):
        return f.listed("eos_token_id", int)
    return (f.integer("eos_token_id", least=0),) if f.has("eos_token_id") else ()


def read_windows(f: Fields, window: int | None, sliding: tuple[bool, ...]) -> dict[str, Any]:
    """`window` and `full_layers` from `layer_types` if there, else from `sliding`, one for each layer."""
    kinds, layers = f.listed("layer_types", str, None), f.integer("num_hidden_layers")
    if kinds is not None:
        known = ("sliding_attention", "full_attention")
        if len(kinds) != layers:
            raise f.error(f"layer_types has {len(kinds)} entries, but num_hidden_layers is {layers}")
        if unknown := [kind for kind in kinds if kind not in known]:
            raise f.error(f"layer_types names {unknown[0]!r}; known are {' and '.join(known)}")
        sliding = tuple(kind == "sliding_attention" for kind in kinds)
    if not any(sliding):
        return {}
    if window is None:
        raise f.error("layer_types has sliding_attention, but sliding_window is missing")
    return {"window": window, "full_layers": tuple(i for i, s in enumerate(sliding) if not s)}


def decoder_names(cfg: ModelConfig) -> dict[str, Names]:
    """Names outside the routed experts. Only those of leaves that `cfg` has are looked at."""
    N, K, H = cfg.n_heads, cfg.n_kv_heads, cfg.d_head
    heads = Rows((N * H, K * H, K * H))
    return {
        "embed": Names(("model.embed_tokens.weight",)),
        "final_norm": Names(("model.norm.weight",)),
        "final_norm_bias": Names(("model.norm.bias",)),
        "head": Names(("lm_head.weight",)),
        "head_bias": Names(("lm_head.bias",)),
        "attention_norm": Names((LAYER + "input_layernorm.weight",)),
        "attention_norm_bias": Names((LAYER + "input_layernorm.bias",)),
        "ffn_norm": Names((LAYER + "post_attention_layernorm.weight",)),
        "ffn_norm_bias": Names((LAYER + "post_attention_layernorm.bias",)),
        "qkv": Names(tuple(f"{ATTENTION}{x}_proj.weight" for x in "qkv"), heads),
        "qkv_bias": Names(tuple(f"{ATTENTION}{x}_proj.bias" for x in "qkv"), heads),
        "query_norm": Names((ATTENTION + "q_norm.weight",)),
        "key_norm": Names((ATTENTION + "k_norm.weight",)),
        "sinks": Names((ATTENTION + "sinks",)),
        "out": Names((ATTENTION + "o_proj.weight",)),
        "out_bias": Names((ATTENTION + "o_proj.bias",)),
        **swiglu_names("ffn", MLP),
    }


def expert_names(router: str, experts: str, *, shared: str = "") -> dict[str, Names]:
    """Names of a routed layer: the router's weight, and the experts (and the always-on one) as separate projections."""
    return {
        "moe.router": Names((router,)),
        "moe.bias": Names(()),
        **swiglu_names("moe.experts", experts + "{expert}."),
        **(swiglu_names("moe.shared", shared) if shared else {}),
    }


def swiglu_names(leaf: str, prefix: str) -> dict[str, Names]:
    """Names of a feed-forward whose three projections are tensors of their own."""
    return {
        f"{leaf}.gate_up": Names((prefix + "gate_proj.weight", prefix + "up_proj.weight"), Halves()),
        f"{leaf}.down": Names((prefix + "down_proj.weight",)),
    }


def read_experts(f: Fields) -> dict[str, int]:
    """How many routed experts there are (spelt in one of three ways) and how many each token goes to."""
    spelt = {key: f.integer(key) for key in ("num_experts", "num_local_experts", "n_routed_experts") if f.has(key)}
    if not spelt:
        raise f.error("num_experts (or num_local_experts, or n_routed_experts) is missing")
    if len(set(spelt.values())) > 1:
        raise f.error(" but ".join(f"{key} is {value}" for key, value in spelt.items()))
    return {"experts": next(iter(spelt.values())), "experts_per_token": f.integer("num_experts_per_tok")}
