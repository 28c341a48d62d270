"""Small folders of every family as they are published, written without `transformers`: for tests that have no torch."""

from pathlib import Path
from typing import Any

import numpy as np

from planner.inputs.published import FAMILIES
from planner.inputs.published.mistral_format import FAMILY
from tests.support.families.case import Case
from tests.support.families.mistral_format import in_own_format, own_values, write_config
from tests.support.families.published import ALL
from tests.support.published import published_folder

VOCABULARY = 272
"""Room for the tokenizer of bytes that the folders have."""


def small_config(name: str, **changes: Any) -> dict[str, Any]:
    """The config.json or params.json of one of ALL, with the fields that it names and no others; `changes` are of its
    decoder, by their names in transformers."""
    case = ALL[name]
    if case.family == FAMILY:
        return own_values(_decoder(case) | changes) | {"model_type": FAMILY, "dtype": "float32"}
    return _written(case, case.family, **changes)


def small_folder(folder: Path, name: str, seed: int = 0) -> dict[str, np.ndarray]:
    """Write the folder; its tensors are returned."""
    case = ALL[name]
    if case.family != FAMILY:
        return published_folder(folder, small_config(name), seed=seed)
    transformers_folder(folder, name, seed)
    tensors = in_own_format(folder, _decoder(case))
    write_config(folder, small_config(name))
    return tensors


def transformers_folder(folder: Path, name: str, seed: int = 0) -> dict[str, np.ndarray]:
    """The same as transformers would write it, whatever its format; its tensors are returned."""
    return published_folder(folder, _written(ALL[name], ALL[name].model_type), seed=seed)


def _decoder(case: Case) -> dict[str, Any]:
    """The fields of a decoder as transformers writes them."""
    decoder = case.decoder | {"model_type": case.model_type}
    decoder |= {"vocab_size": max(VOCABULARY, decoder["vocab_size"])}
    del decoder["attn_implementation"]  # how transformers computes, no part of a model
    return decoder


def _written(case: Case, family: str, **changes: Any) -> dict[str, Any]:
    """The config.json of a case."""
    decoder = _decoder(case) | ({} if case.family == FAMILY else case.rewrite) | changes
    architecture = FAMILIES[family].architectures[0]
    return case.placed(decoder, model_type=family, architectures=[architecture], torch_dtype="float32")
