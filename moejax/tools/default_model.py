"""The folder of the default model, SmolLM2 split into experts and distilled, which is made on first use."""

import hashlib
import tomllib
from pathlib import Path

from moejax.checkpoint.download import cache_folder
from moejax.checkpoint.model_folder import RECIPE, checked_folder, exclusive
from moejax.config.config_values import Config, ConfigError, build_config
from moejax.tools.distil import Distillation
from moejax.tools.moefy import Split
from moejax.tools.smollm2 import DISTILLATION_WINDOW, SEPARATOR, build, distillation_texts
from planner.inputs.shipped import shipped

PRESET = shipped("configs/presets/smollm2-moe.toml")


def ensure_default() -> Path:
    """The folder of the model as its preset says. Raises as `moejax.tools.resolve.ensure_model` does."""
    return ensure_smollm2(load_split(PRESET), load_distillation(PRESET))


def ensure_smollm2(split: Split, distillation: Distillation | None = None) -> Path:
    """The folder of SmolLM2 split, and unless `distillation` is None distilled, in this way: found in the cache or made
    there."""
    is_default = (split, distillation) == (load_split(PRESET), load_distillation(PRESET))
    name = "smollm2-moe" if is_default else f"smollm2-moe-{split.label}"
    label = split.label
    if distillation is not None:
        about = f"{distillation} {DISTILLATION_WINDOW}" + SEPARATOR.join(distillation_texts())
        label += f"-distilled{hashlib.sha256(about.encode()).hexdigest()[:8]}"
    folder = cache_folder() / "models" / f"smollm2-moe-{label}-recipe{RECIPE}"
    with exclusive(folder):
        if not folder.is_dir():
            build(folder, name, split, distillation)
    return checked_folder(folder)


def load_split(path: Path) -> Split:
    """Read the `[split]` table of a preset. Raises ConfigError on an unknown key."""
    return _load_table(path, Split, "split")


def load_distillation(path: Path) -> Distillation:
    """Read the `[distillation]` table of a preset. Raises ConfigError on an unknown key."""
    return _load_table(path, Distillation, "distillation")


def _load_table(path: Path, kind: type[Config], table: str) -> Config:
    with path.open("rb") as file:
        values = tomllib.load(file)
    try:
        return build_config(kind, values[table], table)
    except KeyError as error:
        raise ConfigError(f"{path} lacks the table {error}.") from None
    except ConfigError as error:
        raise ConfigError(f"{path}, table {table}: {error}") from None
