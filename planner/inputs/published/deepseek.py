"""DeepSeek-V2 (arXiv 2405.04434), DeepSeek-V3 and R1 (arXiv 2412.19437), Kimi-K2, which is V3 in other sizes, and
DeepSeek-V3.2 (arXiv 2512.02556), whose attention sees the positions that an indexer chooses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from planner.inputs.latent_attention import LatentAttention
from planner.inputs.published.config_fields import ConfigFields
from planner.inputs.published.decoder import read_decoder, read_dense_layers, read_experts
from planner.inputs.published.rope import rope_scaling_kind, yarn_magnitude
from planner.inputs.routed_experts import RoutedExperts
from planner.inputs.sparse_attention import Indexer


def read_deepseek_v2(f: ConfigFields) -> dict[str, Any]:
    """DeepSeek-V2: gates are shares of a softmax; a group counts by its best expert."""
    method = f.values.get("topk_method") or "greedy"
    if method not in ("greedy", "group_limited_greedy"):
        raise f.error(f"topk_method is {method!r}; known are 'greedy' and 'group_limited_greedy'")
    grouped = method == "group_limited_greedy"
    width = f.integer("moe_intermediate_size", 1407)
    experts = read_experts(
        f,
        per_token=None,
        width=width,
        d_shared=f.integer("n_shared_experts", 2, null=0, least=0) * width,
        gate="share",
        gate_scale=f.number("routed_scaling_factor", 1.0),
        groups=f.integer("n_group", 1) if grouped else 1,
        groups_used=f.integer("topk_group", 1) if grouped else 1,
    )
    return read_latent_decoder(f, experts, context=2048, stop=(2,)) | read_dense_layers(f, 0)


def reader_of_v3(*, groups: int, used: int, scale: float, dense: int) -> Callable[[ConfigFields], dict[str, Any]]:
    """Reads DeepSeek-V3, or a model of its architecture with other defaults."""

    def read(f: ConfigFields) -> dict[str, Any]:
        experts = read_sigmoid_experts(f, width=2048, groups=groups, used=used, scale=scale)
        return read_latent_decoder(f, experts, context=4096, stop=(1,)) | read_dense_layers(f, dense)

    return read


def read_deepseek_v32(f: ConfigFields) -> dict[str, Any]:
    """DeepSeek-V3.2: V3 with an indexer in every layer."""
    experts = read_sigmoid_experts(f, width=2048, experts=256, groups=8, used=4, scale=2.5)
    plain = read_latent_decoder(f, experts, context=163_840, stop=(1,))
    return plain | read_dense_layers(f, 3) | {"indexer": read_indexer(f, heads=64)}


def read_indexer(f: ConfigFields, *, heads: int) -> Indexer:
    """The indexer of V3.2 and GLM-5; `heads` is the default of the family's class."""
    rotated = f.integer("qk_rope_head_dim", 64)
    size = f.integer("index_head_dim", 128)
    if size < rotated:
        raise f.error(f"index_head_dim is {size}, but {rotated} numbers of an indexer's key are rotated")
    if not f.integer("q_lora_rank", 1, null=0):
        raise f.error("q_lora_rank is null; the queries of an indexer are made of the latent of the queries")
    return Indexer(heads=f.integer("index_n_heads", heads), d_key=size, chosen=f.integer("index_topk", 2048))


def read_sigmoid_experts(
    f: ConfigFields,
    *,
    width: int,
    groups: int = 1,
    used: int = 1,
    scale: float = 1.0,
    per_token: int = 8,
    experts: int | None = None,
    normalised: bool = True,
    scale_key: str = "routed_scaling_factor",
    shared_key: str = "n_shared_experts",
    shared: int = 1,
) -> RoutedExperts:
    """Routing by sigmoid plus bias, with a family's spellings and defaults: V3's (section 2.1.2), also GLM-4's,
    dots1's, Hunyuan's and EXAONE's."""
    width = f.integer("moe_intermediate_size", width)
    return read_experts(
        f,
        per_token=per_token,
        experts=experts,
        width=width,
        d_shared=f.integer(shared_key, shared, null=0, least=0) * width,
        gate="sigmoid",
        normalised=f.flag("norm_topk_prob", normalised),
        gate_scale=f.number(scale_key, scale),
        groups=f.integer("n_group", groups, null=1),
        groups_used=f.integer("topk_group", used, null=1),
        router_bias=True,
    )


def read_latent_decoder(
    f: ConfigFields,
    experts: RoutedExperts,
    *,
    context: int,
    stop: tuple[int, ...],
    norm_eps: float = 1e-6,
    d_plain: int = 128,
    d_value: int = 128,
    d_query: int = 1536,
    d_latent: int = 512,
) -> dict[str, Any]:
    """A decoder with latent attention, with the defaults of a family's class."""
    latent = LatentAttention(
        d_latent=f.integer("kv_lora_rank", d_latent),
        d_rope=f.integer("qk_rope_head_dim", 64),
        d_plain=f.integer("qk_nope_head_dim", d_plain),
        d_value=f.integer("v_head_dim", d_value),
        d_query=f.integer("q_lora_rank", d_query, null=0),
    )
    size = latent.d_plain + latent.d_rope
    plain = read_decoder(f, context=context, stop=stop, norm_eps=norm_eps, head_size=size, rotated=latent.d_rope)
    biased = f.flag("attention_bias", False)
    return plain | {
        "kv_heads": plain["heads"],
        "latent": latent,
        # A partial_rotary_factor, if given, is a part of all of a head.
        "rope": replace(plain["rope"], size=latent.d_rope),
        "experts": experts,
        "qkv_bias": biased,
        "out_bias": biased,
        "mlp_bias": f.flag("mlp_bias", False),
        "score_scale": size**-0.5 * _yarn_score_scale(f),
    }


def _yarn_score_scale(f: ConfigFields) -> float:
    """YaRN's factor on scores, which DeepSeek applies to the softmax and not to the rotated vectors."""
    scaling = f.nested("rope_parameters") or f.nested("rope_scaling")
    if scaling is None or rope_scaling_kind(scaling) == "default":
        return 1.0
    all_dims = scaling.number("mscale_all_dim", 0.0)
    return yarn_magnitude(scaling.number("factor"), all_dims) ** 2 if all_dims else 1.0
