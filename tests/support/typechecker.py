"""The checker of annotations in tests: beartype, for which an int is a float as it is for Python."""

from pathlib import Path

from beartype import BeartypeConf, beartype

check = beartype(conf=BeartypeConf(is_pep484_tower=True))

UNCHECKED = {
    "moejax.config.attention_config": "it refuses wrong values itself, with a message of its own",
    "moejax.config.config_values": "it reads values of any type for those that do",
    "moejax.config.layer_segments": "it is asked for every tensor of a model, and reads kinds that `model_config` made",
    "moejax.config.model_config": "it refuses wrong values itself, with a message of its own",
    "moejax.config.moe_config": "it refuses wrong values itself, with a message of its own",
    "moejax.config.param_spec": "it is made for every tensor of a model, whenever its tensors are listed",
    "moejax.config.params": "its trees also hold specs, shapes, and what Orbax puts in their place",
    "moejax.config.state_params": "its trees also hold specs and shapes, as those of `params`",
}


def checked_modules() -> list[str]:
    """All modules of moejax but those of `UNCHECKED`."""
    root = Path(__file__).parents[2]
    files = (file.relative_to(root).with_suffix("") for file in (root / "moejax").rglob("*.py"))
    names = (".".join(file.parts).removesuffix(".__init__") for file in files)
    # The name of a package stands for all that is in it.
    packages = {"moejax"} | {f"moejax.{room.name}" for room in (root / "moejax").iterdir() if room.is_dir()}
    return sorted(set(names) - packages - UNCHECKED.keys())
