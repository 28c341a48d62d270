"""The layer of multi-token prediction of a model folder of ours, which lies beside the model: `FOLDER/mtp`.

    config.json      the configuration of the model with that layer
    checksums.json   the manifest of the layer's tensors alone
    params/state/    these tensors

So the model is the same in every bit with it and without, and one that is served without it does not hold it.
`join_head` makes the folder of the model with its layer.
"""

import os
import shutil
import tempfile
from pathlib import Path

from moejax.checkpoint.checkpoint import write_metadata, write_params
from moejax.checkpoint.manifest import FILE, Manifest
from moejax.checkpoint.model_folder import PARAMS, draft_folder
from moejax.config.model_config import ModelConfig
from moejax.config.params import Params, named_tensors

HEAD = "mtp"
"""The folder of the layer in that of its model."""
TEMPLATES = "additional_chat_templates"
"""The folder of a model's named chat templates."""
STATE = Path(PARAMS) / "state"


def head_tensors(cfg: ModelConfig, names: list[str]) -> list[str]:
    """Of the names of a model's tensors, those of its layer of multi-token prediction."""
    return [name for name in names if name.startswith(("mtp.", f"segments.{len(cfg.main_segments)}."))]


def save_head(folder: Path, cfg: ModelConfig, params: Params) -> None:
    """Write the layer of multi-token prediction of `params`, in the dtype to store, beside the model in `folder`,
    replacing an older one."""
    manifest = Manifest.of(named_tensors(params))
    manifest.check_config(cfg, folder)
    names = head_tensors(cfg, list(manifest.tensors))
    with draft_folder(folder / HEAD) as draft, tempfile.TemporaryDirectory() as whole:
        write_params(Path(whole) / PARAMS, params)
        for name in names:
            shutil.copytree(Path(whole) / STATE / name, draft / STATE / name)
        (draft / FILE).write_text(Manifest({name: manifest.tensors[name] for name in names}).to_json())
        (draft / "config.json").write_text(cfg.to_json() + "\n")


def join_head(source: Path, head: Path, target: Path) -> None:
    """Write the model folder `target`: the model of `source` with the layer in `head`. Weights are linked where the
    file system can.

    Raises CheckpointError when the layer is not of this model's shape.
    """
    cfg = ModelConfig.load(head)
    manifest = Manifest({**Manifest.load(source).tensors, **Manifest.load(head).tensors})
    manifest.check_config(cfg, head)
    with draft_folder(target) as draft:
        for folder in (source, head):
            for name in Manifest.load(folder).tensors:
                shutil.copytree(folder / STATE / name, draft / STATE / name, copy_function=_link)
        write_metadata(draft / PARAMS, cfg)
        for file in (each for each in source.iterdir() if each.is_file() and each.name not in ("config.json", FILE)):
            shutil.copy2(file, draft / file.name)
        if (templates := source / TEMPLATES).is_dir():
            shutil.copytree(templates, draft / TEMPLATES)
        (draft / FILE).write_text(manifest.to_json())
        (draft / "config.json").write_text(cfg.to_json() + "\n")


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
