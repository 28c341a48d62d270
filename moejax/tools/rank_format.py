"""The format that ranks hold a model in when they are to hold it as it is published, and what widening it costs."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from moejax.config.model_config import ModelConfig, WeightFormat
from moejax.config.packed_form import GROUP
from moejax.config.params import tensor_specs
from moejax.config.weight_formats import is_matrix, weight_bytes
from planner.errors import PlannerError
from planner.inputs.published import published_model, read_config_values, workload_of
from planner.inputs.workload import Workload

PUBLISHED = "published"
"""The value of `--data-type` that asks for what lies in the folder."""
AUTO = "auto"
"""The value of `--data-type` that asks for what the model's own configuration says (`ModelConfig.weights`)."""
PLAIN = ("float32", "bfloat16", "float16")
KEPT = ("int4", "mxfp4", "nvfp4", "fp8", "int8")
"""Published forms that ranks hold as they are."""
AS_THEY_ARE = "As they are, ranks hold matrices that all layers have in one form, with"
EIGHT_BIT = {
    "fp8": "numbers in E4M3 and scales of tensors, outputs, blocks, or groups of inputs",
    "int8": "scales of tensors, outputs, or groups of inputs in their order",
}
"""The forms of eight bits of `KEPT`."""
NOTED = 1.05
"""Ranks that hold more than this times the published bytes are worth a note."""


def format_as_stored(cfg: ModelConfig, dtypes: Mapping[str, np.dtype], published: Workload | None) -> WeightFormat:
    """The narrowest format of ranks for matrices that are stored in these number formats, by leaf: bfloat16 for
    bfloat16, and for float16 that stands for quantised numbers; float32 for what bfloat16 would round."""
    sizes = {"float32": 0, "bfloat16": 0, "float16": 0}
    for path, spec in tensor_specs(cfg).items():
        if is_matrix(spec):
            name = np.dtype(dtypes[path]).name
            sizes[name if name in sizes else "float32"] += spec.size
    most = max(sizes, key=lambda name: sizes[name])
    is_quantized = published is not None and published.weight_format not in PLAIN
    return "bfloat16" if most == "bfloat16" or (most == "float16" and is_quantized) else "float32"


def stored_note(cfg: ModelConfig, dtypes: Mapping[str, np.dtype]) -> str:
    """In which form the weights of a model folder of ours are stored and in which ranks hold them, with the bytes of
    both."""
    sizes: dict[str, int] = {}
    for path, spec in tensor_specs(cfg).items():
        dtype = np.dtype(dtypes[path])
        sizes[dtype.name] = sizes.get(dtype.name, 0) + spec.size * dtype.itemsize
    most = max(sizes, key=lambda name: sizes[name])
    held = weight_bytes(cfg, experts=True) + weight_bytes(cfg, experts=False)
    return (
        f"{cfg.name} is stored in {most}, {_size(sum(sizes.values()))}; ranks hold its weights in {cfg.weights}, "
        f"{_size(held)} with one copy of each expert."
    )


def published_workload(folder: Path) -> Workload | None:
    """The planner's reading of a published folder; None where it cannot say the form of the weights."""
    try:
        return workload_of(published_model(read_config_values(folder)))
    except PlannerError:
        return None


def widening_note(cfg: ModelConfig, published: Workload | None, *, sharded: bool = False) -> str:
    """In which form the weights of a model are published and in which ranks hold them, with the bytes of both, and for
    few bits why they are widened; empty unless ranks hold more. With `sharded`, dense layers were cut."""
    if published is None:
        return ""
    lies = published.moe_layers * published.experts * published.expert_bytes + published.rest_bytes
    held = weight_bytes(cfg, experts=True) + weight_bytes(cfg, experts=False)
    if held <= NOTED * lies:
        return ""
    note = (
        f"{cfg.name} is published in {published.weight_format}, {_size(lies)}; ranks hold its weights in "
        f"{cfg.weights}, {_size(held)} with one copy of each expert."
    )
    if published.weight_format not in KEPT or cfg.packed is not None:
        return note
    if sharded:
        return f"{note} Without --dense sharded, --data-type {PUBLISHED} keeps matrices in {published.weight_format}."
    if published.weight_format in EIGHT_BIT:
        return f"{note} {AS_THEY_ARE} {EIGHT_BIT[published.weight_format]}."
    return (
        f"{note} {AS_THEY_ARE} groups in the order of the inputs and of a multiple of {GROUP} of them (NVFP4: "
        f"{GROUP // 2}), with scales in 16 bits."
    )


def _size(count: float) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
