"""Small folders of every family as they are published, written without `transformers`: for tests that have no torch."""

from pathlib import Path
from typing import Any

import numpy as np

from planner.inputs.published import FAMILIES
from tests.support.families.published import ALL
from tests.support.published import published_folder

VOCABULARY = 272
"""Room for the tokenizer of bytes that the folders have."""


def small_config(name: str, **changes: Any) -> dict[str, Any]:
    """The config.json of one of ALL, with the fields that it names and no others; `changes` are of its decoder."""
    case = ALL[name]
    decoder = case.decoder | {"model_type": case.model_type} | case.rewrite
    decoder |= {"vocab_size": max(VOCABULARY, decoder["vocab_size"])} | changes
    del decoder["attn_implementation"]  # how transformers computes, no part of a model
    architecture = FAMILIES[case.family].architectures[0]
    return case.placed(decoder, model_type=case.family, architectures=[architecture], torch_dtype="float32")


def small_folder(folder: Path, name: str, seed: int = 0) -> dict[str, np.ndarray]:
    """Write the folder; its tensors are returned."""
    return published_folder(folder, small_config(name), seed=seed)
