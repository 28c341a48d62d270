"""Cuts the dense layers of a model into shards that are stored as experts are: in slots, replicated, restored singly.

A dense feed-forward part is a SwiGLU, so it is the sum of the SwiGLUs of any cut of its width (tensor parallelism).
A layer that is cut into as many shards as there are experts needs only what experts have: each rank holds some of its
shards, a lost shard comes from its replica or from the host's memory, and its rows are sent there. A sharded layer
differs from the replicated one by the order of its sums.
"""

import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import tensorstore

from moejax.checkpoint.checkpoint import write_metadata
from moejax.checkpoint.convert import ProgressCallback, open_leaf
from moejax.checkpoint.host_store import HostStore
from moejax.checkpoint.manifest import FILE, Manifest, TensorRecord
from moejax.checkpoint.model_folder import PARAMS, draft_folder
from moejax.config.model_config import ModelConfig
from moejax.config.params import tensor_specs

WHOLE, DIVIDED = ".ffn.", ".moe.experts."


def sharded_dense_config(cfg: ModelConfig) -> ModelConfig | None:
    """The configuration with sharded dense layers; None for a model that has none beside its routed ones. Raises
    ConfigError when they cannot be cut into as many shards as there are experts."""
    return replace(cfg, shard_dense=True) if {"dense", "moe"} <= set(cfg.layer_kinds) else None


def shard_dense(source: Path, target: Path, on_progress: ProgressCallback) -> None:
    """Write the model folder `target`: that of `source` with sharded dense layers. Other weights are linked where
    the file system can. Memory is that of the largest tensor of a dense layer.

    Raises ConfigError as `sharded_dense_config` does, and StoreError for weights that are missing or damaged.
    """
    store = HostStore.open(source)
    cfg = sharded_dense_config(store.cfg)
    assert cfg is not None, f"{store.cfg.name} has dense layers"
    manifest = Manifest.load(source)
    with draft_folder(target) as draft:
        sharded = Manifest(dict(_write(store, cfg, manifest, draft / PARAMS, on_progress)))
        sharded.check_config(cfg, draft)
        write_metadata(draft / PARAMS, cfg)
        for file in (f for f in source.iterdir() if f.is_file() and f.name not in ("config.json", FILE)):
            shutil.copy2(file, draft / file.name)
        (draft / FILE).write_text(sharded.to_json())
        (draft / "config.json").write_text(cfg.to_json() + "\n")


def _write(
    store: HostStore, cfg: ModelConfig, manifest: Manifest, params: Path, on_progress: ProgressCallback
) -> Iterator[tuple[str, TensorRecord]]:
    specs, done = tensor_specs(cfg), 0
    total = sum(tensor.bytes for tensor in manifest.tensors.values())
    context = tensorstore.Context({"file_io_concurrency": {"limit": 4}})
    for source, tensor in manifest.tensors.items():
        name = source.replace(WHOLE, DIVIDED)
        if name != source:
            cut = _cut_rows if name.endswith("gate_up") else _cut_columns
            shards = cut(store.read(source), specs[name].shape)
            tensor = Manifest.of({name: shards}).tensors[name]
            leaf = open_leaf(params, name, shards.shape, 2, shards.dtype, context)
            for writing in [leaf[r, e].write(shards[r, e]) for r in range(len(shards)) for e in range(shards.shape[1])]:
                writing.result()
        else:
            leaf = Path("state") / name
            shutil.copytree(store.folder / PARAMS / leaf, params / leaf, copy_function=_link)
        done += tensor.bytes
        on_progress(done, total)
        yield name, tensor


def _cut_rows(gate_up: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """`[R, 2F, D]` as `[R, E, 2F / E, D]`: in each shard its gate stays above its up."""
    R, E, _, D = shape
    return np.ascontiguousarray(gate_up.reshape(R, 2, E, -1, D).transpose(0, 2, 1, 3, 4)).reshape(shape)


def _cut_columns(down: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """`[R, D, F]` as `[R, E, D, F / E]`."""
    R, E, D, width = shape
    return np.ascontiguousarray(down.reshape(R, D, E, width).transpose(0, 2, 1, 3))


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
