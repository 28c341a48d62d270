"""Published models: one reader of config.json for planner and server, without JAX.

name, values = find_published("deepseek-v3")      # a preset, a config.json, or the folder that it is in
model = published_model(values)  # PublishedModel, read as `transformers` reads it
count_parameters(model).total
workload_of(model, name=name)                     # what the planner plans for
"""

from planner.inputs.published.families import CARDS_WITHOUT_EMBEDDING, FAMILIES, NOT_READ
from planner.inputs.published.model import PublishedModel, PublishedRope
from planner.inputs.published.parameter_counts import (
    ParameterCounts,
    cache_elements,
    cache_number_bytes,
    count_parameters,
    unwindowed_cache_elements,
)
from planner.inputs.published.planned_workload import (
    DRAFTS_SERVED,
    draft_layers,
    is_published,
    read_model,
    workload_from,
    workload_of,
)
from planner.inputs.published.quantization import BYTES
from planner.inputs.published.reader import (
    MODELS,
    find_published,
    published_model,
    read_config_values,
)
from planner.inputs.published.weight_form import WeightForm

__all__ = [
    "BYTES",
    "CARDS_WITHOUT_EMBEDDING",
    "DRAFTS_SERVED",
    "FAMILIES",
    "MODELS",
    "NOT_READ",
    "ParameterCounts",
    "PublishedModel",
    "PublishedRope",
    "WeightForm",
    "cache_elements",
    "cache_number_bytes",
    "count_parameters",
    "draft_layers",
    "find_published",
    "is_published",
    "published_model",
    "read_config_values",
    "read_model",
    "unwindowed_cache_elements",
    "workload_from",
    "workload_of",
]
