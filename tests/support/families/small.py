"""Small folders of every family as they are published, written without `transformers`: for tests that have no torch."""

from pathlib import Path
from typing import Any

import numpy as np

from moejax.families import FAMILIES
from tests.moejax.families.published import CASES, SIZES
from tests.moejax.published import published_folder

VOCABULARY = 272
"""Room for the tokenizer of bytes that the folders have."""


def small_config(name: str) -> dict[str, Any]:
    """The config.json of one of CASES, with the fields that it names and no others."""
    case = CASES[name]
    values = SIZES | case.fields | {"model_type": case.model_type} | case.rewrite | {"vocab_size": VOCABULARY}
    del values["attn_implementation"]  # how transformers computes, no part of a model
    return values | {"architectures": [FAMILIES[values["model_type"]].architectures[0]], "torch_dtype": "float32"}


def small_folder(folder: Path, name: str, seed: int = 0) -> dict[str, np.ndarray]:
    """Write the folder; its tensors are returned."""
    return published_folder(folder, small_config(name), seed=seed)
