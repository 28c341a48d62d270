"""The form in which a checkpoint stores its weights: number formats, quantization and what is exempt from it.

It is read from `torch_dtype` or `dtype`, and from `quantization_config` or `compression_config`, which may lie beside
`text_config`: fp8, mxfp4, compressed-tensors, modelopt (also from `hf_quant_config.json`), awq, gptq and quark.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from planner.errors import InputError, unknown_key
from planner.inputs.published.config_fields import ConfigFields

BYTES = {
    "float32": 4.0,
    "bfloat16": 2.0,
    "float16": 2.0,
    "fp8": 1.0,
    "int8": 1.0,
    "mxfp4": 0.5 + 1 / 32,
    "nvfp4": 0.5 + 1 / 16,
    "int4": 0.5 + 2 / 32,
}
"""Bytes of a number in each format, the scales of its groups included: MXFP4 has a byte for each 32 numbers, NVFP4 one
for each 16, int4 two (a bfloat16) for each 32."""

FP8_BLOCK = 1.0 + 4 / 128**2
"""Bytes of an fp8 number with a float32 scale for each block of 128 x 128 (DeepSeek-V3, arXiv 2412.19437, 3.3.2)."""

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


@dataclass(frozen=True)
class _Quantization:
    """A format and the bytes of its numbers, for the modules that it `covers`."""

    format: str
    bytes: float
    covers: Callable[[str], bool] = lambda module: True


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
    quantizations, exempt = _read_quantization(given)
    plain = _Quantization(dtype, BYTES[dtype])

    def quantization_of(part: str, layer: int) -> _Quantization:
        modules = [f"{p}layers.{layer}.{m}" for p in PREFIXES for m in MODULES[part]]
        if any(_matches(module, exempt) for module in modules):
            return plain
        return next((q for q in quantizations if any(map(q.covers, modules))), plain)

    def mean(part: str, among: Iterable[int]) -> float:
        each = [quantization_of(part, layer).bytes for layer in among]
        return sum(each) / len(each) if each else plain.bytes

    others = [i for i in range(layers) if i not in routed]
    main = [quantization_of("experts", i) for i in routed] or [quantization_of("dense", i) for i in range(layers)]
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


def _read_quantization(q: ConfigFields) -> tuple[list[_Quantization], list[str]]:
    """The quantizations of a configuration, the most specific first, and the modules that are exempt."""
    method = q.values.get("quant_method")
    exempt = [
        name
        for key in ("ignore", "exclude_modules", "modules_to_not_convert", "ignored_layers", "exclude")
        for name in q.listed(key, str, ())
    ]
    if method == "fp8" or method == "fbgemm_fp8":
        return [_Quantization("fp8", _block_bytes(q))], exempt
    if method == "mxfp4":
        return [_Quantization("mxfp4", BYTES["mxfp4"], lambda module: ".experts." in module)], exempt
    if method in ("awq", "gptq"):
        bits, group = q.integer("bits", 4), q.integer("group_size", 128, least=-1)
        return [_group_quantization(q, bits, group, zeros=True)], exempt
    if method == "modelopt":
        return [_modelopt(q)], exempt
    if method == "quark":
        inner = q.nested("global_quant_config")
        weight = inner.nested("weight") if inner else None
        if weight is not None and str(weight.values.get("dtype")).startswith("fp4"):
            return [_Quantization("mxfp4", 0.5 + 1 / weight.integer("group_size", 32))], exempt
        if weight is not None and str(weight.values.get("dtype")).startswith("fp8"):
            return [_Quantization("fp8", 1.0)], exempt
    if method == "compressed-tensors" and (groups := q.nested("config_groups")):
        found = [_compressed(group) for name in groups.values if (group := groups.nested(name)) is not None]
        return [each for _, each in sorted(found, key=lambda pair: pair[0])], exempt
    raise q.error(f"quantization {method!r} is not known; pass --weights, one of {', '.join(BYTES)}")


def _block_bytes(q: ConfigFields) -> float:
    block = q.listed("weight_block_size", int, None)
    if block is None:
        return 1.0
    if len(block) != 2 or min(block) < 1:
        raise q.error(f"weight_block_size is {list(block)}; it must be two numbers of at least 1")
    return 1.0 + 4 / (block[0] * block[1])


def _group_quantization(q: ConfigFields, bits: int, group: int, *, zeros: bool) -> _Quantization:
    """Integers of `bits` with a 16-bit scale per group (-1: per row, which counts for nothing), and a zero if so."""
    if bits not in (4, 8):
        raise q.error(f"weights of {bits} bits are not known; pass --weights, one of {', '.join(BYTES)}")
    extra = (2 + (bits / 8 if zeros else 0)) / group if group > 0 else 0.0
    return _Quantization(f"int{bits}", bits / 8 + extra)


def _modelopt(q: ConfigFields) -> _Quantization:
    algorithm = str(q.values.get("quant_algo"))
    if "NVFP4" in algorithm:
        return _Quantization("nvfp4", 0.5 + 1 / q.integer("group_size", 16))
    if algorithm.startswith("FP8"):
        return _Quantization("fp8", FP8_BLOCK if "PB" in algorithm or "BLOCK" in algorithm else 1.0)
    if algorithm.startswith(("W4A", "INT4")):
        return _group_quantization(q, 4, q.integer("group_size", 128), zeros=False)
    if algorithm.startswith("MXFP4"):
        return _Quantization("mxfp4", BYTES["mxfp4"])
    raise q.error(f"quant_algo {algorithm!r} is not known; pass --weights, one of {', '.join(BYTES)}")


def _compressed(group: ConfigFields) -> tuple[int, _Quantization]:
    """A group of compressed-tensors, and its rank: one that names modules comes before one for all linear layers."""
    weights = group.nested("weights")
    if weights is None:
        raise group.error("weights is missing")
    targets = group.listed("targets", str, ("Linear",))
    bits, size = weights.integer("num_bits", 8), weights.integer("group_size", -1, least=-1)
    if weights.text("type", "int") == "int":
        found = _group_quantization(weights, bits, size, zeros=not weights.flag("symmetric", True))
    elif bits == 8:
        block = weights.listed("block_structure", int, ())
        found = _Quantization("fp8", FP8_BLOCK if block else 1.0)
    elif bits == 4:
        found = _Quantization("mxfp4" if size == 32 else "nvfp4", 0.5 + 1 / max(1, size))
    else:
        raise weights.error(f"floats of {bits} bits are not known; pass --weights, one of {', '.join(BYTES)}")
    if "Linear" in targets:
        return 1, found
    return 0, _Quantization(found.format, found.bytes, lambda module: _matches(module, targets))


def _matches(module: str, patterns: Iterable[str]) -> bool:
    """Whether a module, or one that it is in, is named by a pattern: a regular expression after `re:`, a shell pattern,
    or a dotted part of the name."""
    for pattern in patterns:
        if pattern.startswith("re:"):
            try:
                if re.match(pattern[3:], module):
                    return True
            except re.error:
                continue
        elif "*" in pattern:
            if fnmatch.fnmatchcase(module, pattern) or fnmatch.fnmatchcase(module, f"{pattern}.*"):
                return True
        elif f".{pattern}." in f".{module}.":
            return True
    return False
