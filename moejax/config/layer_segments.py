"""The layers of a model as segments: patterns that repeat, one scan each."""

import itertools
from collections.abc import Sequence
from typing import Literal

LayerKind = Literal["dense", "moe", "sharded", "bare"]
"""Of a layer by its feed-forward part; a bare layer has none."""
Kinds = tuple[LayerKind, ...]
Segments = tuple[tuple[Kinds, int], ...]
"""(pattern, repeats) of each segment, in order."""


def in_slots(kind: LayerKind) -> bool:
    """True when the feed-forward weights of layers of this kind are held in slots."""
    return kind in ("moe", "sharded")


def segments_of_kinds(kinds: Kinds, pattern: Kinds) -> Segments:
    """Repeats of the pattern, and of single kinds where it does not follow. 7 layers, every third routed:
    ((("dense", "dense", "moe"), 2), (("dense",), 1)). 5 layers, the first dense, the others routed:
    ((("dense",), 1), (("moe",), 4))."""
    found, at, size = [], 0, len(pattern)
    whole = [kinds[i : i + size] == pattern for i in range(len(kinds) + size)]
    while at < len(kinds):
        end = at
        if whole[at]:
            while whole[end]:
                end += size
            found.append((pattern, (end - at) // size))
        else:
            while end < len(kinds) and kinds[end] == kinds[at] and not whole[end]:
                end += 1
            found.append(((kinds[at],), end - at))
        at = end
    return tuple(found)


def segments_of_patterns(kinds: Kinds, layers: Sequence[object]) -> Segments:
    """The segments of a model whose layers differ in more than their feed-forward part: `layers` has all in which each
    does. From each layer on, the pattern whose repeats reach furthest, the shortest of these."""
    found, at = [], 0
    while at < len(layers):
        counts = {size: _repeats(layers[at:], size) for size in range(1, len(layers) - at + 1)}
        size = max(counts, key=lambda size: (counts[size] > 1) * size * counts[size])
        found.append((kinds[at : at + size], counts[size]))
        at += size * counts[size]
    return tuple(found)


def segments_of_one_pattern(kinds: Kinds, layers: Sequence[object]) -> Segments:
    """As `segments_of_patterns`, as folders of models with delta nets have them, which were converted before there were
    others: the shortest pattern that all layers repeat, and the layers that are left."""
    size = next(n for n in range(1, len(layers) + 1) if layers[n:] == layers[: len(layers) - n])
    repeats, left = divmod(len(kinds), size)
    return ((kinds[:size], repeats), *(((kinds[:left], 1),) if left else ()))


def _repeats(layers: Sequence[object], size: int) -> int:
    """How often the first `size` layers follow each other from the beginning."""
    alike = itertools.takewhile(lambda i: layers[i] == layers[i % size], range(len(layers)))
    return sum(1 for _ in alike) // size
