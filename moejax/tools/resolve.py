"""From a model's name to its folder.

`tiny` is in the repository; `smollm2-moe` and `bench-mixtral` are made on first use, in the cache; anything else is a
folder, ours or one as models are published, which is converted on first use, into the cache, or a GGUF file.
"""

import hashlib
import json
from pathlib import Path

from moejax.checkpoint.convert import convert, progress
from moejax.checkpoint.download import cache_folder
from moejax.checkpoint.families import WITHOUT_MTP, read_config
from moejax.checkpoint.manifest import CheckpointError, content_hash
from moejax.checkpoint.model_folder import CHANGED, MADE, PARAMS, RECIPE, checked_folder, exclusive
from moejax.checkpoint.mtp_head import HEAD, join_head
from moejax.checkpoint.published import fingerprint, published_name
from moejax.checkpoint.published_store import RECORD, record_checksums
from moejax.checkpoint.shard_dense import shard_dense, sharded_dense_config
from moejax.config.model_config import ModelConfig
from moejax.tools.random_model import build_random, load_random
from planner.inputs.published.mistral_format import FILE as MISTRAL_FILE
from planner.inputs.published.mistral_format import config_file
from planner.inputs.shipped import shipped


def ensure_model(name_or_path: str | Path, *, mtp: bool = False) -> Path:
    """The folder of a model, made first if need be; with `mtp` one with its layer of multi-token prediction.

    Raises AssetUnavailable when the default model cannot be fetched, CheckpointError when there is no such
    model or its weights are not those of its configuration, ConfigError on a preset that cannot be and on an
    architecture that is not served.
    """
    path = published_place(Path(name_or_path))
    if is_published(path):
        return ensure_converted(path, mtp=mtp)
    folder = _ensure_own(str(path))
    return ensure_mtp(folder) if mtp else folder


def _ensure_own(name_or_path: str) -> Path:
    if str(name_or_path) == "tiny":
        return checked_folder(shipped("models/tiny"))
    if str(name_or_path) == "smollm2-moe":
        from moejax.tools.default_model import (
            ensure_default,  # not at import: scipy and optax, which no other start needs
        )

        return ensure_default()
    if str(name_or_path) == "bench-mixtral":
        return ensure_random(shipped("configs/presets/bench-mixtral.toml"))
    return checked_folder(Path(name_or_path))


def published_place(path: Path) -> Path:
    """The published folder of a GGUF file, made first if need be; any other path as it is."""
    if not is_gguf(path):
        return path
    from moejax.tools.gguf_folder import ensure_folder  # not at import: reads and writes GGUF, which others do not need

    return ensure_folder(path)


def is_gguf(path: Path) -> bool:
    """True for a file of GGUF."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(4) == b"GGUF"


def is_published(folder: Path) -> bool:
    """True for a folder as models are published: config.json names a `model_type` or params.json is there, and nothing
    of ours is."""
    path = config_file(folder)
    if not path.is_file() or (folder / PARAMS).exists():
        return False
    if path.name == MISTRAL_FILE:
        return True
    try:
        return "model_type" in json.loads(path.read_text("utf-8-sig"))
    except (ValueError, TypeError):
        return False


def ensure_mtp(folder: Path) -> Path:
    """The folder of the same model with its layer of multi-token prediction (`moejax.checkpoint.mtp_head`), from the
    cache or made there; the folder itself if it has that layer. Raises CheckpointError for a model without one."""
    cfg = ModelConfig.load(folder)
    if cfg.mtp:
        return folder
    head = folder / HEAD
    if not head.is_dir():
        raise CheckpointError(f"{cfg.name} has no layer of multi-token prediction: {head} is not there. {WITHOUT_MTP}")
    joined = _place_of_made(folder) / f"{cfg.name}-{content_hash(folder)}-mtp-{content_hash(head)}"
    with exclusive(joined):
        if not joined.is_dir():
            join_head(folder, head, joined)
    return checked_folder(joined)


def ensure_converted(published: Path, *, mtp: bool = False) -> Path:
    """A published folder converted to our form, from the cache or made there; made again when one of its files
    changes."""
    name = published_name(published)
    cfg = read_config(published, name=name, mtp=mtp)
    folder = _place_of_made(published) / f"{name}-{fingerprint(published, cfg, None)}"
    if not folder.is_dir():
        with progress(f"Converting {name}, once") as on_progress:
            convert(published, folder, name=name, on_progress=on_progress, mtp=mtp)
    return checked_folder(folder)


def ensure_checksums(published: Path, *, mtp: bool = False) -> Path:
    """The checksums with which a published folder is read in place (`moejax.checkpoint.published_store`), from the
    cache or made there; made again when one of its files changes."""
    name = published_name(published)
    cfg = read_config(published, name=name, mtp=mtp)
    folder = _place_of_made(published) / f"{name}-{fingerprint(published, cfg, None)}-as-published-{RECORD}"
    if not folder.is_dir():
        with progress(f"Noting the checksums of {name}, once") as on_progress:
            record_checksums(published, folder, name=name, on_progress=on_progress, mtp=mtp)
    return folder


def ensure_random(preset: Path) -> Path:
    """The folder of a model of random weights, found in the cache or made there."""
    cfg, seed = load_random(preset)
    about = hashlib.sha256(f"{cfg.to_json()} {seed} {RECIPE}".encode()).hexdigest()[:16]
    folder = cache_folder() / "models" / f"{cfg.name}-{about}"
    with exclusive(folder):
        if not folder.is_dir():
            with progress(f"Making {cfg.name}, once"):
                build_random(folder, cfg, seed)
    return checked_folder(folder)


def ensure_sharded_dense(folder: Path) -> Path:
    """The folder of the same model with sharded dense layers (`moejax.checkpoint.shard_dense`), from the cache or made
    there; the folder itself if the model has no dense layers. Raises ConfigError when they cannot be sharded."""
    cfg = ModelConfig.load(folder)
    if sharded_dense_config(cfg) is None:
        return folder
    sharded = _place_of_made(folder) / f"{cfg.name}-{content_hash(folder)}-divided-recipe{RECIPE}"
    if not sharded.is_dir():
        with progress(f"Dividing the dense layers of {cfg.name}, once") as on_progress:
            shard_dense(folder, sharded, on_progress)
    return checked_folder(sharded)


def _place_of_made(source: Path) -> Path:
    """Where the folders that are made of a folder lie: in the cache, those of a folder of changed tensors in itself."""
    changed = next((each for each in (source, *source.parents) if (each / CHANGED).is_file()), None)
    return cache_folder() / "models" if changed is None else changed / MADE
