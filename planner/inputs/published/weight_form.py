"""The form in which a checkpoint stores its weights: number formats, quantization and what is exempt from it.

It is read from `torch_dtype` or `dtype`, and from `quantization_config` or `compression_config`, which may lie beside
`text_config` (`planner.inputs.published.quantization`), or, of modelopt, in `hf_quant_config.json`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from planner.errors import InputError, unknown_key
from planner.inputs.published.config_fields import ConfigFields
from planner.inputs.published.quantization import BYTES, FP8_BLOCK, Scheme, read_quantization

EXPERTS_ONLY = ("mxfp4", "nvfp4", "int4")
"""Formats that are usual for routed experts alone, the rest being bfloat16."""

MODULES = {
    "attention": ("self_attn.q_proj", "self_attn.o_proj", "self_attn.kv_b_proj"),
    "dense": ("mlp.down_proj", "feed_forward.down_proj"),
    "shared": ("mlp.shared_experts.down_proj", "mlp.shared_expert.down_proj", "feed_forward.shared_expert.down_proj"),
    "experts": ("mlp.experts.0.down_proj", "block_sparse_moe.experts.0.w2", "feed_forward.experts.0.down_proj"),
}
"""Names of modules that stand for each part of a layer where a configuration names what is not quantized."""

PREFIXES = ("model.", "language_model.model.", "model.language_model.")


@dataclass(frozen=True, kw_only=True)
class WeightForm:
    """Bytes of a parameter, by the part of the model that it is in: `base` of embeddings, head, norms and routers,
    the others of the matrices of that part. `format` is the format of most matrices (of the routed experts, if any).
    `problem` says why a form is not known; its bytes are then those of bfloat16."""

    format: str
    base: float
    attention: float
    dense: float
    shared: float
    experts: float
    problem: str = ""


def uniform_form(name: str) -> WeightForm:
    """The form of weights that are all of one format (of `BYTES`); 4-bit formats are those of routed experts alone.

    Raises InputError for a format that is not known.
    """
    if name not in BYTES:
        raise unknown_key(name, BYTES, "--weights")
    rest = BYTES["bfloat16"] if name in EXPERTS_ONLY else _scaled(name)
    base = max(BYTES["bfloat16"], rest)
    return WeightForm(format=name, base=base, attention=rest, dense=rest, shared=rest, experts=_scaled(name))


def read_weight_form(f: ConfigFields, *, layers: int, routed: tuple[int, ...]) -> WeightForm:
    """The form that a configuration says its weights have; one with a `problem` where it is not known."""
    try:
        return _read_form(f, layers, routed)
    except InputError as error:
        return replace(uniform_form("bfloat16"), problem=str(error))


def _read_form(f: ConfigFields, layers: int, routed: tuple[int, ...]) -> WeightForm:
    dtype = f.values.get("torch_dtype") or f.values.get("dtype") or "bfloat16"
    given = f.nested("quantization_config") or f.nested("compression_config")
    if not isinstance(dtype, str) or BYTES.get(dtype, 0) < 1:
        raise f.error(f"torch_dtype {dtype!r} is not known; pass --weights, one of {', '.join(BYTES)}")
    if given is None:
        return uniform_form(dtype)
    quantization = read_quantization(given)
    plain = Scheme(format=dtype, bytes=BYTES[dtype])

    def scheme_of(part: str, layer: int) -> Scheme:
        return quantization.scheme(f"{p}layers.{layer}.{m}" for p in PREFIXES for m in MODULES[part]) or plain

    def mean(part: str, among: Iterable[int]) -> float:
        each = [scheme_of(part, layer).bytes for layer in among]
        return sum(each) / len(each) if each else plain.bytes

    others = [i for i in range(layers) if i not in routed]
    main = [scheme_of("experts", i) for i in routed] or [scheme_of("dense", i) for i in range(layers)]
    names = [q.format for q in main]
    return WeightForm(
        format=max(set(names), key=names.count) if names else dtype,
        base=max(BYTES["bfloat16"], BYTES[dtype]),
        attention=mean("attention", range(layers)),
        dense=mean("dense", others),
        shared=mean("shared", routed),
        experts=mean("experts", routed),
    )


def _scaled(name: str) -> float:
    return FP8_BLOCK if name == "fp8" else BYTES[name]
