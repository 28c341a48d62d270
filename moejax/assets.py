"""From a model's name to its folder: `python -m moejax.assets NAME` prints the path.

`tiny` is in the repository; `smollm2-moe` is made on first use, in the cache; anything else is a folder.
"""

import argparse
import os
import sys
import tomllib
from pathlib import Path

from moejax.checkpoint import CheckpointError
from moejax.config import ConfigError
from moejax.download import AssetUnavailable, cache_folder
from moejax.manifest import content_hash
from moejax.smollm2 import build
from moejax.split import Split
from moejax.store import HostStore, StoreError

ROOT = Path(__file__).resolve().parent.parent
RECIPE = 1
"""Part of the name of made models: a change of how they are made raises it, and they are made anew."""


def ensure_model(name_or_path: str | Path) -> Path:
    """The folder of a model, made first if need be.

    Raises AssetUnavailable when the default model cannot be fetched, CheckpointError when there is no such
    model, ConfigError on a preset that cannot be.
    """
    if str(name_or_path) == "tiny":
        return checked_folder(ROOT / "models" / "tiny")
    if str(name_or_path) == "smollm2-moe":
        return ensure_smollm2(load_split(ROOT / "configs" / "presets" / "smollm2-moe.toml"))
    return checked_folder(Path(name_or_path))


def ensure_smollm2(split: Split) -> Path:
    """The folder of SmolLM2 split in this way, found in the cache or made there."""
    default = load_split(ROOT / "configs" / "presets" / "smollm2-moe.toml")
    name = "smollm2-moe" if split == default else f"smollm2-moe-{split.label}"
    folder = cache_folder() / "models" / f"smollm2-moe-{split.label}-recipe{RECIPE}"
    if not folder.is_dir():
        build(folder, name, split)
    return checked_folder(folder)


def load_split(path: Path) -> Split:
    """Read the `[split]` table of a preset. Raises ConfigError on an unknown key."""
    with path.open("rb") as file:
        values = tomllib.load(file)
    try:
        return Split(**values["split"])
    except (KeyError, TypeError) as error:
        raise ConfigError(f"{path}, table split: {error}.") from None


def checked_folder(folder: Path) -> Path:
    """The folder, if all that a model folder holds is there; else CheckpointError naming what is missing."""
    if not folder.is_dir():
        raise CheckpointError(
            f"{folder} is no folder, and no model has that name; known are smollm2-moe and tiny."
        )
    for file in ("config.json", "tokenizer.json", "chat_template.jinja", "params"):
        if not (folder / file).exists():
            raise CheckpointError(f"{folder} lacks {file}: it is no model folder.")
    content_hash(folder)
    return folder


def main(argv: list[str] | None = None) -> int:
    """Print the folder of a model, and with `--store` the host store made from it, one path a line.

    The front starts this as a process of its own, as it never imports JAX itself.
    """
    parser = argparse.ArgumentParser(prog="python -m moejax.assets", description=main.__doc__)
    parser.add_argument(
        "model", nargs="?", default="smollm2-moe", help="smollm2-moe, tiny, or a model folder"
    )
    parser.add_argument("--store", action="store_true", help="also copy the weights to the host's memory")
    options = parser.parse_args(argv)
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    try:
        folder = ensure_model(options.model)
        print(folder)
        if options.store:
            print(HostStore.create(folder).folder)
    except (AssetUnavailable, CheckpointError, ConfigError, StoreError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
