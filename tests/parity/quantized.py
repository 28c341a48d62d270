"""Small quantised matrices of odd shapes, and what the tools that write them make of them: `compressed-tensors`
quantises and dequantises its own forms, `transformers` block FP8, `awq` AWQ.

    python -m tests.parity.quantized        records the answers that tests read without these packages
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

NARROW = {"bfloat16": "int16", "float8_e4m3fn": "int8"}
"""Number formats that NumPy lacks, and those of the integers in whose place they are recorded."""
ANSWERS = Path(__file__).parents[1] / "support" / "quantized.safetensors"
GROUPED = {"strategy": "group", "num_bits": 4, "type": "int"}
WEIGHTS = {
    "fp8 tensor": (10, 24, {"num_bits": 8, "type": "float", "strategy": "tensor"}),
    "fp8 channel": (10, 24, {"num_bits": 8, "type": "float", "strategy": "channel"}),
    "fp8 block": (21, 37, {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [8, 16]}),
    "int8 channel": (7, 19, {"num_bits": 8, "type": "int", "strategy": "channel"}),
    "int8 channel, zero points": (7, 19, {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": False}),
    "int4 groups of 32": (11, 96, GROUPED | {"group_size": 32}),
    "int4 groups of 8, zero points": (13, 40, GROUPED | {"group_size": 8, "symmetric": False}),
    "int4 channel": (9, 29, {"num_bits": 4, "type": "int", "strategy": "channel"}),
    "int8 packed, groups of 16": (5, 48, GROUPED | {"num_bits": 8, "group_size": 16, "symmetric": False}),
    "nvfp4": (6, 48, {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}),
    "mxfp4": (6, 64, {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32}),
    "mxfp8": (6, 64, {"num_bits": 8, "type": "float", "strategy": "group", "group_size": 32}),
}
FORMATS = {
    "fp8": "float-quantized",
    "int8 c": "int-quantized",
    "int": "pack-quantized",
    "nvfp4": "nvfp4-pack-quantized",
    "mxfp4": "mxfp4-pack-quantized",
    "mxfp8": "mxfp8-quantized",
}
"""Of compressed-tensors, by the beginning of a case's name."""


class Answer(NamedTuple):
    """Stored tensors of one matrix `w`, the configuration that describes them, and the numbers `[out, in]`."""

    name: str
    config: dict[str, Any]
    stored: dict[str, np.ndarray]
    numbers: np.ndarray


def answers() -> Iterator[Answer]:
    """All cases, computed again."""
    for name in WEIGHTS:
        for scale in ("float32", "bfloat16"):
            yield compressed(name, scale)
    yield fine_grained()
    yield awq()


def compressed(name: str, dtype: str) -> Answer:
    """A matrix that compressed-tensors writes, its scales in this number format."""
    import torch
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    rows, columns, weights = WEIGHTS[name]
    torch.manual_seed(rows * columns)
    args = QuantizationArgs(**weights, scale_dtype=torch.uint8 if name == "mxfp8" else None)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    w = torch.randn(rows, columns) * torch.rand(rows, 1)
    state = {"weight": w} | _scales(torch, w, weights, getattr(torch, dtype))
    form = next(value for start, value in FORMATS.items() if name.startswith(start))
    compressor = BaseCompressor.load_from_registry(form) if hasattr(BaseCompressor, "load_from_registry") else None
    compressor = compressor or BaseCompressor.get_value_from_registry(form)
    stored = compressor.compress(state, scheme)
    numbers = compressor.decompress(stored, scheme)["weight"]
    config = {"quant_method": "compressed-tensors", "format": form, "config_groups": {"group_0": {"weights": weights}}}
    kept = {f"w.{key}": value for key, value in stored.items() if value is not None}
    return Answer(f"{name}, {dtype} scales", config, {k: _array(torch, v) for k, v in kept.items()}, _wide(numbers))


def _scales(torch: Any, w: Any, weights: dict[str, Any], dtype: Any) -> dict[str, Any]:
    """Scales of a matrix as a calibration finds them, by its strategy."""
    rows, columns = w.shape
    bits, group = weights["num_bits"], weights.get("group_size", columns)
    top = {("float", 8): 448.0, ("float", 4): 6.0}.get((weights["type"], bits), 2.0 ** (bits - 1) - 1)
    if weights["strategy"] == "block":
        by, wide = weights["block_structure"]
        padded = torch.nn.functional.pad(w, (0, -columns % wide, 0, -rows % by))
        blocks = padded.reshape(-(-rows // by), by, -(-columns // wide), wide).abs().amax((1, 3))
        return {"weight_scale": (blocks / top).to(dtype)}
    if weights["strategy"] == "tensor":
        return {"weight_scale": (w.abs().max() / top).reshape(1).to(dtype)}
    grouped = w.reshape(rows, -1, group)
    if not weights.get("symmetric", True):
        low, high = grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)
        scale = ((high - low) / (2**bits - 1)).to(dtype)
        zero = torch.round(-(2 ** (bits - 1)) - low / scale.float())
        return {
            "weight_scale": scale,
            "weight_zero_point": zero.clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1).to(torch.int8),
        }
    scale = grouped.abs().amax(-1) / top
    if weights["strategy"] == "tensor_group":
        whole = 448.0 * 6.0 / w.abs().max()
        return {
            "weight_scale": (scale * whole).to(torch.float8_e4m3fn).to(dtype),
            "weight_global_scale": whole.reshape(1),
        }
    if group == 32 and weights["type"] == "float":
        scale = torch.exp2(torch.ceil(torch.log2(scale)))
    return {"weight_scale": scale.to(dtype)}


def fine_grained() -> Answer:
    """Block FP8 as transformers widens it."""
    import torch
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    torch.manual_seed(3)
    w = (torch.randn(24, 32) * 20).to(torch.float8_e4m3fn)
    scale = torch.rand(3, 2)
    numbers = Fp8Dequantize(None)._dequantize_one(w, scale)
    stored = {"w.weight": _array(torch, w), "w.weight_scale_inv": scale.numpy()}
    return Answer("fp8 of transformers", {"quant_method": "fp8", "weight_block_size": [8, 16]}, stored, _wide(numbers))


def awq() -> Answer:
    """AWQ as AutoAWQ widens it."""
    import torch
    from awq.utils.packing_utils import dequantize_gemm

    draw = np.random.default_rng(4)
    packed, zeros = (torch.from_numpy(draw.integers(-(2**31), 2**31, (n, 3), dtype=np.int32)) for n in (40, 5))
    scales = torch.from_numpy(draw.uniform(0.01, 0.1, (5, 24)).astype(np.float16))
    numbers = dequantize_gemm(packed, zeros, scales, 4, 8).T
    stored = {"w.qweight": packed.numpy(), "w.qzeros": zeros.numpy(), "w.scales": scales.numpy()}
    return Answer("awq", {"quant_method": "awq", "bits": 4, "group_size": 8}, stored, _wide(numbers))


def _array(torch: Any, tensor: Any) -> np.ndarray:
    for name, integers in NARROW.items():
        if tensor.dtype == getattr(torch, name):
            same = tensor.contiguous().view(getattr(torch, integers))
            return same.numpy().view(getattr(ml_dtypes, name))
    return tensor.contiguous().numpy()


def _wide(numbers: Any) -> np.ndarray:
    return np.ascontiguousarray(numbers.float().numpy())


def recorded() -> list[Answer]:
    """The answers that were recorded."""
    from safetensors import safe_open

    found = []
    with safe_open(ANSWERS, framework="numpy") as file:
        about = {key: json.loads(value) for key, value in (file.metadata() or {}).items()}
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    for name, dtype in about["dtypes"].items():
        arrays[name] = arrays[name].view(getattr(ml_dtypes, dtype))
    for name, config in about["configs"].items():
        own = {key.removeprefix(f"{name}/"): value for key, value in arrays.items() if key.startswith(f"{name}/")}
        found.append(Answer(name, config, own, own.pop("numbers")))
    return found


def main(compute: Callable[[], Iterator[Answer]] = answers) -> None:
    """Record all answers."""
    from safetensors.numpy import save_file

    found = list(compute())
    arrays = {f"{each.name}/{key}": value for each in found for key, value in each.stored.items()}
    arrays |= {f"{each.name}/numbers": each.numbers for each in found}
    dtypes = {name: array.dtype.name for name, array in arrays.items() if array.dtype.name in NARROW}
    for name in dtypes:
        arrays[name] = arrays[name].view(NARROW[dtypes[name]])
    configs = {each.name: each.config for each in found}
    save_file(arrays, ANSWERS, {"configs": json.dumps(configs), "dtypes": json.dumps(dtypes)})


if __name__ == "__main__":
    main()
