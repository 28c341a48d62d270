"""The tensors of a published checkpoint, one entry for each array of our parameter tree."""

import fnmatch
from collections.abc import Iterator

from moejax.config import ConfigError, ModelConfig
from moejax.families.family import Family, NameMap
from moejax.families.reader import FAMILIES
from moejax.families.source import Entry, Tensor
from moejax.manifest import is_expert, tensor_specs
from moejax.params import ParamSpec


def tensor_names(cfg: ModelConfig) -> Iterator[Entry]:
    """Every array of the parameter tree of `cfg`: leaf by leaf, repeat by repeat, expert by expert.

    Raises ConfigError when `cfg` is not of a published family.
    """
    names = _family(cfg).names(cfg)
    for path, spec in tensor_specs(cfg).items():
        yield from _entries(cfg, names, path, spec)


def is_unused(cfg: ModelConfig, name: str) -> bool:
    """True for a tensor that published checkpoints of this model hold and the decoder does not need."""
    patterns = _family(cfg).unused(cfg) + (("lm_head.weight",) if cfg.tied_head else ())
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _entries(cfg: ModelConfig, names: NameMap, path: str, spec: ParamSpec) -> Iterator[Entry]:
    if not path.startswith("segments."):
        yield _entry(names, path, path, (None, None, None), 0, spec.shape)
        return
    _, segment, position, key = path.split(".", 3)
    before = sum(len(pattern) * repeats for pattern, repeats in cfg.segments[: int(segment)])
    pattern, repeats = cfg.segments[int(segment)]
    for repeat in range(repeats):
        layer = before + repeat * len(pattern) + int(position)
        if not is_expert(path):
            yield _entry(names, path, key, (repeat, None, layer), 0, spec.shape[1:])
            continue
        experts = spec.shape[1]
        for expert in range(experts):
            yield _entry(names, path, key, (repeat, expert, layer), experts, spec.shape[2:])


def _entry(
    names: NameMap,
    path: str,
    key: str,
    place: tuple[int | None, int | None, int | None],
    experts: int,
    shape: tuple[int, ...],
) -> Entry:
    repeat, expert, layer = place
    found = names[key]
    shapes = found.transform.shapes(shape) if found.names else ()
    tensors = []
    for name, each in zip(found.names, shapes, strict=True):
        fused = expert is not None and "{expert}" not in name
        full = name.format(layer=layer, expert=expert)
        tensors.append(Tensor(full, (experts, *each), expert) if fused else Tensor(full, each))
    return Entry(
        path=path,
        repeat=repeat,
        expert=expert,
        layer=layer,
        shape=shape,
        tensors=tuple(tensors),
        transform=found.transform,
    )


def _family(cfg: ModelConfig) -> Family:
    if cfg.family not in FAMILIES:
        raise ConfigError(
            f"{cfg.name} is of family {cfg.family!r}, which has no published checkpoints; "
            f"those have {', '.join(sorted(FAMILIES))}."
        )
    return FAMILIES[cfg.family]
