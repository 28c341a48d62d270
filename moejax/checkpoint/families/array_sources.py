"""The tensors of a published checkpoint, one entry for each array of our parameter tree."""

import dataclasses
import fnmatch
import functools
from collections.abc import Callable, Iterator, Mapping

from moejax.checkpoint.families.family import NameMap, ServedFamily
from moejax.checkpoint.families.reader import SERVED_FAMILIES
from moejax.checkpoint.families.source import ArraySource, SourceTensor
from moejax.config.config_values import ConfigError
from moejax.config.model_config import ModelConfig
from moejax.config.params import ParamSpec, is_expert, tensor_specs


def array_sources(cfg: ModelConfig) -> Iterator[ArraySource]:
    """Every array of the parameter tree of `cfg`: leaf by leaf, repeat by repeat, expert by expert.

    Raises ConfigError when `cfg` is not of a published family.
    """
    family = _family(cfg)
    names_of = functools.cache(functools.partial(_names, family=family))  # most layers have those of another
    for path, spec in tensor_specs(cfg).items():
        yield from _entries(cfg, family, names_of, path, spec)


def is_unused(cfg: ModelConfig, name: str) -> bool:
    """True for a tensor that published checkpoints of this model hold and the decoder does not need."""
    family = _family(cfg)
    patterns = family.unused(cfg) + (("lm_head.weight",) if cfg.tied_head else ())
    named = (*map(family.published, patterns), *family.beside)
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in named)


def _names(cfg: ModelConfig, family: ServedFamily) -> NameMap:
    """The name map of a family, or of one of its layers, with names as they are published."""
    return {
        key: dataclasses.replace(found, names=tuple(map(family.published, found.names)))
        for key, found in family.names(cfg).items()
    }


def _entries(
    cfg: ModelConfig, family: ServedFamily, names_of: Callable[[ModelConfig], NameMap], path: str, spec: ParamSpec
) -> Iterator[ArraySource]:
    if not path.startswith("segments."):
        yield _entry(names_of(cfg), path, path, (None, None, None), {}, 0, spec.shape)
        return
    _, segment, position, key = path.split(".", 3)
    before = sum(len(pattern) * repeats for pattern, repeats in cfg.segments[: int(segment)])
    pattern, repeats = cfg.segments[int(segment)]
    names = names_of(cfg.of_layer(before + int(position)))
    for repeat in range(repeats):
        layer = before + repeat * len(pattern) + int(position)
        found = family.numbers(cfg, layer)
        if not is_expert(path):
            yield _entry(names, path, key, (repeat, None, layer), found, 0, spec.shape[1:])
            continue
        experts = spec.shape[1]
        for expert in range(experts):
            yield _entry(names, path, key, (repeat, expert, layer), found, experts, spec.shape[2:])


def _entry(
    names: NameMap,
    path: str,
    key: str,
    index: tuple[int | None, int | None, int | None],
    numbers: Mapping[str, int],
    experts: int,
    shape: tuple[int, ...],
) -> ArraySource:
    repeat, expert, layer = index
    found = names[key]
    shapes = found.transform.shapes(shape) if found.names else ()
    tensors = []
    for name, each in zip(found.names, shapes, strict=True):
        fused = expert is not None and "{expert}" not in name
        full = name.format(layer=layer, expert=expert, **numbers)
        tensors.append(SourceTensor(full, (experts, *each), expert) if fused else SourceTensor(full, each))
    return ArraySource(
        path=path,
        repeat=repeat,
        expert=expert,
        layer=layer,
        shape=shape,
        tensors=tuple(tensors),
        transform=found.transform,
    )


def _family(cfg: ModelConfig) -> ServedFamily:
    if cfg.family not in SERVED_FAMILIES:
        raise ConfigError(
            f"{cfg.name} is of family {cfg.family!r}, which has no published checkpoints; "
            f"those have {', '.join(sorted(SERVED_FAMILIES))}."
        )
    return SERVED_FAMILIES[cfg.family]
