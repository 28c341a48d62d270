"""Finds the quantised matrices among the tensors of a checkpoint, by their names and number formats."""

from collections.abc import Callable, Iterator, Mapping

import numpy as np

from moejax.checkpoint.manifest import CheckpointError
from moejax.checkpoint.quantized.form import QuantizedTensor, StoredTensor
from moejax.checkpoint.quantized.fp4 import Fp4Blocks, Fp4Tensor
from moejax.checkpoint.quantized.integers import OutputsLastTensor, PackedTensor
from moejax.checkpoint.quantized.scaled import ScaledTensor
from planner.inputs.published.quantization import Scheme

UNUSED = tuple(
    f"{before}{end}"
    for before in (".input", ".output", ".activation", ".q", ".k", ".v", ".kv", ".prob", ".prob_output")
    for end in ("_scale", "_zero_point", "_global_scale", "_scale_ub", "_cache_scaling_factor")
)
"""Ends of the names of scales of activations and of the KV cache, which moejax holds in wider formats."""
OWN_SCALE, OWN_INPUT_SCALE = "qscale_weight", "qscale_act"
"""Names of scales of weights and of activations in Mistral's own format, in place of `weight`."""
NARROW = ("I8", "U8")
"""Number formats of matrices, beside FP8, whose scales stand beside them."""

SchemeOf = Callable[[str], Scheme | None]
ReadShape = Callable[[StoredTensor], np.ndarray]
Stored = Mapping[str, StoredTensor]


def is_unused(name: str) -> bool:
    """True for a scale of activations or of the KV cache."""
    return name.endswith((*UNUSED, f".{OWN_INPUT_SCALE}"))


def find_quantized(
    stored: Stored, scheme_of: SchemeOf, wide: np.dtype, read_numbers: ReadShape
) -> dict[str, QuantizedTensor]:
    """The quantised matrices by the names that they have without quantisation.

    `scheme_of` gives the scheme of a module by its name, `wide` is the number format of the model, `read_numbers` reads
    a stored tensor. Raises CheckpointError for a matrix whose layout needs a configuration that is not there.
    """
    found: dict[str, QuantizedTensor] = {}
    for name, tensor in stored.items():
        if name.endswith("_blocks"):
            stem = name.removesuffix("_blocks")
            if f"{stem}_scales" in stored or tensor.dtype == "U8":
                found[stem] = Fp4Blocks(stem, "mxfp4", _parts(stored, tensor, scale=f"{stem}_scales"), wide)
        elif name.endswith("_packed"):
            stem = name.removesuffix("_packed")
            found[stem] = _packed(stored, tensor, stem, scheme_of, wide, read_numbers)
        elif name.endswith(".qweight"):
            stem = f"{name.removesuffix('.qweight')}.weight"
            found[stem] = _outputs_last(stored, tensor, stem, scheme_of, wide)
        elif _is_scaled(stored, tensor):
            found[name] = _scaled(stored, tensor, scheme_of, wide)
    return found


def _parts(stored: Stored, numbers: StoredTensor, **roles: str) -> dict[str, StoredTensor]:
    return {"numbers": numbers} | {role: stored[name] for role, name in roles.items() if name in stored}


def _scale_names(name: str) -> tuple[str, ...]:
    """The names that the scales of a tensor may have."""
    return f"{name}_scale_inv", f"{name}_scale", f"{name.removesuffix('weight')}{OWN_SCALE}"


def _is_scaled(stored: Stored, tensor: StoredTensor) -> bool:
    """True for numbers of eight bits whose scales stand beside them, and for FP8 in any case."""
    has_scale = any(name in stored for name in _scale_names(tensor.name))
    is_narrow = tensor.dtype.startswith("F8") or (tensor.dtype in NARROW and has_scale)
    return is_narrow and len(tensor.shape) > 1 and not _is_part(stored, tensor.name)


def _is_part(stored: Stored, name: str) -> bool:
    """True for scales that are narrow themselves."""
    stem = next((name.removesuffix(end) for end in ("_scale_inv", "_scale", "_scales") if name.endswith(end)), None)
    return stem is not None and any(f"{stem}{end}" in stored for end in ("", "_packed", "_blocks"))


def _packed(
    stored: Stored,
    tensor: StoredTensor,
    stem: str,
    scheme_of: SchemeOf,
    wide: np.dtype,
    read_numbers: ReadShape,
) -> QuantizedTensor:
    scheme = scheme_of(stem.removesuffix(".weight"))
    if tensor.dtype == "U8":
        parts = _parts(stored, tensor, scale=f"{stem}_scale", **{"global": f"{stem}_global_scale"})
        form = "nvfp4" if "global" in parts or (scheme is not None and scheme.format == "nvfp4") else "mxfp4"
        group = scheme.group if scheme is not None and scheme.group else {"nvfp4": 16, "mxfp4": 32}[form]
        return Fp4Tensor(stem, form, parts, wide, group, divides=True)
    if scheme is None or not scheme.format.startswith("int"):
        raise _lacking(tensor, stem, "int4 or int8 packed by compressed-tensors (num_bits, group_size)")
    roles = {"scale": f"{stem}_scale", "zero": f"{stem}_zero_point", "index": f"{stem}_g_idx"}
    parts = _parts(stored, tensor, **roles)
    rows, words = tensor.shape if len(tensor.shape) == 2 else (0, 0)
    full = (rows, words * 32 // scheme.bits)
    scale = parts.get("scale")
    grouped = scale.shape[-1] * scheme.group if scale is not None and len(scale.shape) == 2 else 0
    if grouped and -(-grouped * scheme.bits // 32) == words:
        full = (rows, grouped)  # groups are whole: no need to open the file for the shape of each expert
    elif f"{stem}_shape" in stored:
        full = tuple(int(n) for n in read_numbers(stored[f"{stem}_shape"]))
    return PackedTensor(stem, scheme.format, parts, wide, scheme, full)


def _outputs_last(
    stored: Stored, tensor: StoredTensor, stem: str, scheme_of: SchemeOf, wide: np.dtype
) -> QuantizedTensor:
    scheme = scheme_of(stem.removesuffix(".weight"))
    if scheme is None or not scheme.packing:
        raise _lacking(tensor, stem, "AWQ or GPTQ (bits, group_size)")
    module = stem.removesuffix("weight")
    roles = {"scale": f"{module}scales", "zero": f"{module}qzeros"}
    if scheme.packing == "gptq":
        roles["index"] = f"{module}g_idx"
    return OutputsLastTensor(stem, f"{scheme.format} ({scheme.packing})", _parts(stored, tensor, **roles), wide, scheme)


def _scaled(stored: Stored, tensor: StoredTensor, scheme_of: SchemeOf, wide: np.dtype) -> QuantizedTensor:
    name = tensor.name
    scheme = scheme_of(name.removesuffix(".weight"))
    if tensor.dtype == "U8":
        parts = _parts(stored, tensor, scale=f"{name}_scale", **{"global": f"{name}_scale_2"})
        form = "nvfp4" if "global" in parts or (scheme is not None and scheme.format == "nvfp4") else "mxfp4"
        group = scheme.group if scheme is not None and scheme.group else {"nvfp4": 16, "mxfp4": 32}[form]
        return Fp4Tensor(name, form, parts, wide, group)
    scales = [each for each in _scale_names(name) if each in stored]
    roles = {"scale": scales[0]} if scales else {}
    parts = _parts(stored, tensor, **roles, zero=f"{name}_zero_point")
    form = "int8" if tensor.dtype == "I8" else "fp8"
    return ScaledTensor(name, form, parts, wide, scheme or Scheme(format=form, bytes=1.0))


def _lacking(tensor: StoredTensor, name: str, form: str) -> CheckpointError:
    return CheckpointError(
        f"{tensor.file}: tensor {tensor.name} is {name.removesuffix('.weight')} in {form}, but quantization_config of "
        "config.json does not say so for this module. Take config.json and the weights from the same place."
    )


def parts_of(quantized: Mapping[str, QuantizedTensor], stored: Stored) -> Iterator[str]:
    """Names of the stored tensors that belong to quantised ones."""
    for each in quantized.values():
        yield from (part.name for part in each.parts.values())
        stem = each.name.removesuffix("weight")
        yield from (n for n in (f"{each.name}_shape", f"{stem}g_idx", f"{stem}qzeros") if n in stored)
