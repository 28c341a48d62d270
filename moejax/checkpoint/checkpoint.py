"""A model folder on disk: written completely or not at all; errors of reading name the damaged file and tensor.

config.json          the ModelConfig
tokenizer.json       Hugging Face tokenizers format; or tokenizer.model, or tekken.json
tokenizer_config.json, generation_config.json
                     what Hugging Face tools need beside it, and how the model is sampled by default
chat_template.jinja  how messages become a prompt, if the model can hold a conversation
params/              an Orbax checkpoint of the `Params` tree, one chunk per routed expert (and, of a converted
                     model, per layer)
checksums.json       the Manifest: shapes, dtypes, CRC-32 of every chunk
"""

import json
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from moejax.checkpoint.manifest import FILE, CheckpointError, Manifest
from moejax.checkpoint.model_folder import PARAMS, draft_folder
from moejax.config.model_config import ModelConfig
from moejax.config.params import Params, is_expert, is_spec, named_tensors, param_specs


def save_model(
    folder: Path,
    cfg: ModelConfig,
    params: Params,
    *,
    tokenizer_json: str,
    chat_template: str,
    generation_config: Mapping[str, Any] | None = None,
) -> None:
    """Write a model folder, replacing an older one; a reader sees the old folder, the new one or none.

    `params` has array leaves of the shapes of `param_specs(cfg)`, in the dtype to store. `generation_config` are the
    sampling parameters that callers of the model get when they give none.
    Raises CheckpointError when they are not the tensors of `cfg`.
    """
    folder = Path(folder)
    host = jax.tree.map(np.asarray, params)
    manifest = Manifest.of(named_tensors(host))
    manifest.check_config(cfg, folder)
    with draft_folder(folder) as draft:
        write_params(draft / PARAMS, host)
        (draft / FILE).write_text(manifest.to_json())
        (draft / "tokenizer.json").write_text(tokenizer_json)
        (draft / "tokenizer_config.json").write_text(tokenizer_config(cfg, tokenizer_json))
        (draft / "chat_template.jinja").write_text(chat_template)
        if generation_config is not None:
            (draft / "generation_config.json").write_text(json.dumps(generation_config, indent=2) + "\n")
        (draft / "config.json").write_text(cfg.to_json() + "\n")


def tokenizer_config(cfg: ModelConfig, tokenizer_json: str) -> str:
    """The `tokenizer_config.json` of a model, with which Hugging Face tools load its tokenizer."""
    added = {token["id"]: token["content"] for token in json.loads(tokenizer_json).get("added_tokens") or ()}
    end = added.get(cfg.stop_tokens[-1]) if cfg.stop_tokens else None
    values = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": cfg.max_context,
        "clean_up_tokenization_spaces": False,
        "eos_token": end,
        "pad_token": end,
    }
    if cfg.bos_token is not None:
        values |= {"bos_token": added.get(cfg.bos_token), "add_bos_token": True}
    return json.dumps({name: value for name, value in values.items() if value is not None}, indent=2) + "\n"


def load_params(folder: Path, cfg: ModelConfig | None = None, *, dtype: Any = np.float32) -> Params:
    """Read all parameters of a model folder as NumPy arrays of `dtype` (None: as they are stored), experts in logical
    order.

    Raises CheckpointError, naming file and tensor, when one is missing, has another shape than the
    configuration says, is truncated, or holds other numbers than were written.
    """
    folder = Path(folder)
    cfg = cfg or ModelConfig.load(folder)
    manifest = Manifest.load(folder)
    manifest.check_config(cfg, folder)
    specs = param_specs(cfg)
    params = read_params(folder / PARAMS, specs)
    for name, array in named_tensors(params).items():
        if bad := manifest.corrupt_chunks(name, array):
            chunks = len(manifest.tensors[name].crc32) > 1
            what = f"chunks {bad} (counted repeat by repeat, expert by expert)" if chunks else "its numbers"
            raise CheckpointError(
                f"{folder / PARAMS}: tensor {name} is corrupt: {what} differ from {FILE}. Make the model again."
            )
    return params if dtype is None else jax.tree.map(lambda a: a.astype(dtype, copy=False), params)


def write_params(path: Path, params: Any) -> None:
    """Write a tree of NumPy arrays as an Orbax checkpoint, one chunk per routed expert."""
    from orbax.checkpoint import v1 as ocp  # here, as a server's start needs no Orbax, and its import takes long

    context = ocp.Context()
    saving: Any = context.array.saving
    # A file per chunk, stored as it is: an expert is read in one go, and a copy in tmpfs is a plain copy.
    saving.use_ocdbt = False
    saving.use_compression = False
    saving.scoped_storage_options_creator = _one_chunk_per_expert
    with context, _quiet():
        ocp.save(str(path.absolute()), params)


def write_metadata(path: Path, cfg: ModelConfig) -> None:
    """Write the Orbax metadata of a checkpoint whose arrays are in `path` already, each under `state/<tensor>`.

    Orbax stores the description of the tree apart from its arrays, so a tree of empty arrays gives the description.
    """
    draft = path.parent / f"{path.name}.skeleton"
    shutil.rmtree(draft, ignore_errors=True)
    specs = param_specs(cfg)
    write_params(draft, jax.tree.map(lambda spec: np.zeros([1] * len(spec.shape), np.float32), specs, is_leaf=is_spec))
    for file in (f for f in draft.rglob("*") if f.is_file()):
        place = file.relative_to(draft)
        if len(place.parts) < 3:  # deeper ones are the empty arrays
            shutil.move(file, path / place)
    shutil.rmtree(draft)


def read_params(path: Path, specs: Any) -> Any:
    """Read an Orbax checkpoint into the tree of `specs` (their shapes do not count). Parameters that the model has not
    (None) need not be known to the checkpoint: one written before they existed is as good.

    Raises CheckpointError with Orbax's own words, which name the file, when it cannot.
    """
    from orbax.checkpoint import v1 as ocp

    try:
        with _quiet():
            stored = ocp.load(str(path.absolute()))
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error

    def leaf(place: Any, _: Any) -> np.ndarray:
        found: Any = stored
        for key in jax.tree_util.keystr(place, simple=True, separator=".").split("."):
            found = found[int(key)] if isinstance(found, list | tuple) else found[key]
        return np.asarray(found)

    return jax.tree_util.tree_map_with_path(leaf, specs, is_leaf=is_spec)


def _one_chunk_per_expert(path: Any, value: Any) -> Any:
    from orbax.checkpoint import v1 as ocp

    if is_expert(jax.tree_util.keystr(path, simple=True, separator=".")):
        return ocp.options.ArrayOptions.Saving.StorageOptions(shard_axes=(0, 1))
    return None


class _quiet:
    """Keep Orbax from warning about the layout chosen here on purpose (no OCDBT)."""

    def __enter__(self) -> None:
        self.logger = logging.getLogger("absl")
        self.level = self.logger.level
        self.logger.setLevel(logging.ERROR)

    def __exit__(self, *exc: object) -> None:
        self.logger.setLevel(self.level)
