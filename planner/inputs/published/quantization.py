"""The quantization that a published configuration describes, by module: what the matrices of a model are stored as.

It is read from `quantization_config` or `compression_config`: fp8, mxfp4, compressed-tensors, modelopt, awq, gptq,
auto-round, quark and gguf. The planner counts bytes with it, and the server reads weights with it.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

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

EXEMPT = ("ignore", "exclude_modules", "modules_to_not_convert", "ignored_layers", "exclude")
"""Fields that list the modules which are not quantized."""


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """How matrices `[out, in]` are stored: the format, and the bytes of a number with its share of the scales.

    `bits` are those of an integer; `group` inputs of an output share a scale (0: no groups), or a `block` of outputs
    and inputs does. `packing` is awq or gptq where these lay integers out; they are `plain` where all zero points are
    in the middle and groups are in order. A zero point is stored less `zero_offset`. `covers` says to which modules it
    applies.
    """

    format: str
    bytes: float
    bits: int = 8
    group: int = 0
    block: tuple[int, int] | None = None
    packing: str = ""
    zero_offset: int = 0
    plain: bool = False
    covers: Callable[[str], bool] = lambda module: True


@dataclass(frozen=True)
class Quantization:
    """The schemes of a model, the most specific first, and patterns of the modules that are exempt."""

    schemes: tuple[Scheme, ...] = ()
    exempt: tuple[str, ...] = ()

    def scheme(self, modules: Iterable[str]) -> Scheme | None:
        """The scheme of a module, which may have several names; None if it is not quantized."""
        names = list(modules)
        if any(_matches(name, self.exempt) for name in names):
            return None
        return next((each for each in self.schemes if any(map(each.covers, names))), None)

    def covering(self, module: str) -> Scheme | None:
        """The scheme of a module that is known to be quantized."""
        return next((each for each in self.schemes if each.covers(module)), None)


def read_quantization(q: ConfigFields) -> Quantization:
    """The quantization that the fields of a `quantization_config` describe. Raises InputError for one not known."""
    exempt = tuple(name for key in EXEMPT for name in q.listed(key, str, ()))
    usual = {"quant_algo": "modelopt", "weight_block_size": "fp8"}
    method = q.values.get("quant_method") or next((name for key, name in usual.items() if q.has(key)), None)
    if method in ("fp8", "fbgemm_fp8", "finegrained_fp8"):
        return Quantization((_fp8(q.listed("weight_block_size", int, None), q),), exempt)
    if method == "mxfp4":
        return Quantization(
            (Scheme(format="mxfp4", bytes=BYTES["mxfp4"], bits=4, group=32, covers=_is_expert),), exempt
        )
    if method in ("awq", "gptq", "auto-round"):
        return Quantization((_packed_by_outputs(q, str(method)),), exempt)
    if isinstance(method, str) and method.startswith("modelopt"):
        return Quantization(tuple(_modelopt(q)), exempt)
    if method == "quark" and (scheme := _quark(q)) is not None:
        return Quantization((scheme,), exempt)
    if method == "gguf":
        return Quantization(tuple(_gguf(q)), exempt)
    if method == "compressed-tensors" and (groups := q.nested("config_groups")):
        _refuse_sparse(q)
        found = [_compressed(group) for name in groups.values if (group := groups.nested(name)) is not None]
        return Quantization(tuple(each for _, each in sorted(found, key=lambda pair: pair[0])), exempt)
    raise q.error(f"quantization {method!r} is not known; pass --weights, one of {', '.join(BYTES)}")


def _is_expert(module: str) -> bool:
    return ".experts." in module


def _fp8(block: tuple[int, ...] | None, q: ConfigFields) -> Scheme:
    if block is None:
        return Scheme(format="fp8", bytes=1.0)
    if len(block) != 2 or min(block) < 1:
        raise q.error(f"weight_block_size is {list(block)}; it must be two numbers of at least 1")
    return Scheme(format="fp8", bytes=1.0 + 4 / (block[0] * block[1]), block=(block[0], block[1]))


def _integers(q: ConfigFields, bits: int, group: int, *, zeros: bool) -> Scheme:
    """Integers of `bits` with a 16-bit scale per group (-1: per row, which counts for nothing), and a zero if so."""
    if bits not in (4, 8):
        raise q.error(f"weights of {bits} bits are not known; pass --weights, one of {', '.join(BYTES)}")
    extra = (2 + (bits / 8 if zeros else 0)) / group if group > 0 else 0.0
    return Scheme(format=f"int{bits}", bytes=bits / 8 + extra, bits=bits, group=max(0, group))


def _packed_by_outputs(q: ConfigFields, method: str) -> Scheme:
    """AWQ and GPTQ. GPTQ stores zero points less one, except in its second format; AutoRound writes either."""
    form = str(q.values.get("packing_format", "auto_round:auto_gptq"))
    if method == "auto-round" and form not in ("auto_round:auto_gptq", "auto_round:auto_awq"):
        raise q.error(f"packing_format {form!r} is not known; pass --weights, one of {', '.join(BYTES)}")
    packing = {"auto-round": form.removeprefix("auto_round:auto_")}.get(method, method)
    bits = q.integer("bits", q.integer("w_bit", 4))
    group = q.integer("group_size", q.integer("q_group_size", 128), least=-1)
    version = str(q.values.get("version", "gemm")).lower()
    if packing == "awq" and (bits != 4 or version != "gemm"):
        form = f"awq {version!r} weights of {bits} bits"
        raise q.error(f"{form} are not known; pass --weights, one of {', '.join(BYTES)}")
    offset = 1 if packing == "gptq" and q.values.get("checkpoint_format") != "gptq_v2" else 0
    plain = q.flag("sym", False) and not q.flag("desc_act", method != "auto-round")
    return replace(_integers(q, bits, group, zeros=True), packing=packing, zero_offset=offset, plain=plain)


def _modelopt(q: ConfigFields) -> list[Scheme]:
    algorithm = str(q.values.get("quant_algo"))
    layers = q.nested("quantized_layers")
    if "kv_cache_quant_algo" in q.values and not q.has("quant_algo"):
        return []  # the cache alone
    if algorithm == "MIXED_PRECISION" and layers is not None:
        return [_modelopt_layer(layer, name) for name in layers.values if (layer := layers.nested(name)) is not None]
    return [_modelopt_scheme(q, algorithm)]


def _modelopt_layer(layer: ConfigFields, name: str) -> Scheme:
    found = _modelopt_scheme(layer, str(layer.values.get("quant_algo")))
    return replace(found, covers=lambda module: _matches(module, (name,)))


def _modelopt_scheme(q: ConfigFields, algorithm: str) -> Scheme:
    if "NVFP4" in algorithm:
        group = q.integer("group_size", 16)
        return Scheme(format="nvfp4", bytes=0.5 + 1 / group, bits=4, group=group)
    if algorithm == "MXFP8":
        return Scheme(format="fp8", bytes=1 + 1 / 32, group=32)
    if algorithm.startswith("FP8"):
        return _fp8((128, 128), q) if "PB" in algorithm or "BLOCK" in algorithm else Scheme(format="fp8", bytes=1.0)
    if algorithm.startswith(("W4A", "INT4")):
        return _integers(q, 4, q.integer("group_size", 128), zeros=False)
    if algorithm.startswith("MXFP4"):
        return Scheme(format="mxfp4", bytes=BYTES["mxfp4"], bits=4, group=32)
    raise q.error(f"quant_algo {algorithm!r} is not known; pass --weights, one of {', '.join(BYTES)}")


def _quark(q: ConfigFields) -> Scheme | None:
    inner = q.nested("global_quant_config")
    weight = inner.nested("weight") if inner else None
    if weight is None:
        return None
    dtype = str(weight.values.get("dtype"))
    if dtype.startswith("fp4"):
        group = weight.integer("group_size", 32)
        return Scheme(format="mxfp4", bytes=0.5 + 1 / group, bits=4, group=group)
    return Scheme(format="fp8", bytes=1.0) if dtype.startswith("fp8") else None


def _compressed(group: ConfigFields) -> tuple[int, Scheme]:
    """A group of compressed-tensors, and its rank: one that names modules comes before one for all linear layers."""
    weights = group.nested("weights")
    if weights is None:
        raise group.error("weights is missing")
    targets = group.listed("targets", str, ("Linear",))
    found = _compressed_scheme(weights)
    if "Linear" in targets:
        return 1, found
    return 0, replace(found, covers=lambda module: _matches(module, targets))


def _compressed_scheme(weights: ConfigFields) -> Scheme:
    bits, size = weights.integer("num_bits", 8), weights.integer("group_size", -1, null=-1, least=-1)
    block = weights.listed("block_structure", int, None)
    if weights.text("type", "int") == "int":
        return _integers(weights, bits, size, zeros=not weights.flag("symmetric", True))
    if bits == 8 and size > 0:
        return Scheme(format="fp8", bytes=1 + 1 / size, group=size)
    if bits == 8:
        return _fp8(block, weights)
    if bits == 4:
        size = max(1, size)
        return Scheme(format="mxfp4" if size == 32 else "nvfp4", bytes=0.5 + 1 / size, bits=4, group=size)
    raise weights.error(f"floats of {bits} bits are not known; pass --weights, one of {', '.join(BYTES)}")


def _refuse_sparse(q: ConfigFields) -> None:
    sparse = q.nested("sparsity_config")
    form = str(q.values.get("format"))
    if form == "marlin-24" or (sparse is not None and str(sparse.values.get("format")) not in ("dense", "None")):
        form = form if sparse is None else str(sparse.values.get("format"))
        raise q.error(f"the sparse format {form!r} is not known; pass --weights, one of {', '.join(BYTES)}")


def _gguf(q: ConfigFields) -> list[Scheme]:
    """Bytes by part of the model, as counted in the tensors of a GGUF file."""
    sizes = q.nested("bytes")
    if sizes is None:
        raise q.error("bytes is missing")
    name = q.text("format", "gguf")
    return [
        Scheme(format=name, bytes=sizes.number(part), covers=lambda module, p=part: _part(module) == p)
        for part in sizes.values
    ]


def _part(module: str) -> str:
    if "self_attn." in module:
        return "attention"
    if _is_expert(module):
        return "experts"
    return "shared" if "shared_expert" in module else "dense"


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
