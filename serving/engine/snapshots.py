"""Snapshots of states: the prefix cache of layers whose context is a state. Values and pure functions.

Keys and values of a prefix lie in its pages; a state is that of a whole sequence. So a request can begin after a prefix
only where a state was kept. A step that ends at a page boundary writes its state to a place of its own, a snapshot, in
place of one of the request's own states, and the next step reads it there; so does a tile of a prompt that ends at one.
Nothing is copied for a snapshot, neither when it is taken nor when a request begins from it (docs/decisions/0031).

A step that is made again must read what it read before. A place is therefore held, and not given away, while a step in
flight reads or writes it, or the next step of a request reads it.
"""

import dataclasses
import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import NamedTuple

from planner.plan.step_layout import TILE

SPACING_PAGES = 8
"""Pages between snapshots inside of a prompt, which are taken where places are free."""


class Boundary(NamedTuple):
    """A page boundary at which a step has a state: the number of tokens before it, and whether the snapshot is
    `optional`, that is taken only where a place is free."""

    position: int
    optional: bool


class SnapshotWrite(NamedTuple):
    """A state that a step writes to a place for snapshots: the state after all tokens before `position`. `optional` is
    that of its Boundary."""

    position: int
    place: int
    optional: bool = False


@dataclasses.dataclass(frozen=True, slots=True)
class Snapshots:
    """The snapshots that a rank has: the place of the state after the page with each key (bytes,
    serving/engine/page_pool.py). The first is the next to be dropped."""

    places: Mapping[bytes, int] = dataclasses.field(default_factory=dict)

    def last_of(self, keys: Iterable[bytes]) -> int:
        """The number of leading pages that a request with these page keys can skip: those up to the last page behind
        which there is a snapshot."""
        return max((at for at, key in enumerate(keys, 1) if key in self.places), default=0)

    def used(self, key: bytes) -> "Snapshots":
        """The same snapshots, after that of `key` was used: it is dropped last."""
        return Snapshots({**self._others(key), key: self.places[key]})

    def add(self, key: bytes, place: int, *, first: bool = False) -> "Snapshots":
        """One more snapshot, to be dropped last, or `first`. A second one of the same key is not kept."""
        if key in self.places:
            return self if first else self.used(key)
        return Snapshots({key: place, **self.places} if first else {**self.places, key: place})

    def without(self, keys: Collection[bytes]) -> "Snapshots":
        """The snapshots without those of `keys`."""
        if self.places.keys().isdisjoint(keys):
            return self
        return Snapshots({key: place for key, place in self.places.items() if key not in keys})

    def take(
        self, places: Iterable[int], held: Collection[int], *, only_free: bool = False, before: bytes | None = None
    ) -> "tuple[Snapshots, int | None]":
        """A place to write on: the lowest that is free, else that of a snapshot that nobody holds, which is dropped,
        first the one of the key `before`, which the new one follows. None where all are `held`, or, with `only_free`,
        none is free."""
        taken = {*self.places.values(), *held}
        free = next((place for place in places if place not in taken), None)
        if free is not None or only_free:
            return self, free
        first = () if before is None or before not in self.places else (before,)
        key = next((key for key in (*first, *self.places) if self.places[key] not in held), None)
        return (self, None) if key is None else (self.without([key]), self.places[key])

    def _others(self, key: bytes) -> dict[bytes, int]:
        return {each: place for each, place in self.places.items() if each != key}


def boundaries(start: int, stop: int, *, page_size: int, prompt: int, branch: int) -> Iterator[Boundary]:
    """The page boundaries at which a step that computes positions `start` .. `stop` - 1 of a request takes snapshots,
    in order. `prompt` is the length of its prompt; up to `branch` its pages were in the cache, and no state.

    A step has a state after each tile and after its last row. Of these at page boundaries it keeps

    - the last one inside of the prompt, for another request with the same prompt, which computes one token at least;
    - the last one up to `branch`: two requests have shared this prefix, so that a third may;
    - one in SPACING_PAGES pages of the prompt, where a place is free: a prefix that the next request may share;
    - the last one behind the prompt, for the next turn of the conversation.
    """
    if stop - start == 1:
        if stop % page_size == 0:
            yield Boundary(stop, optional=False)
        return
    at = [*(at for at in range(start + TILE, stop, TILE) if at % page_size == 0), *([stop] * (stop % page_size == 0))]
    step = math.lcm(TILE, page_size)
    answer = max((position for position in at if position >= prompt), default=None)
    for position in at:
        if position >= prompt:
            if position == answer:
                yield Boundary(position, optional=False)
        elif position + step > prompt - 1 or position <= branch < position + step:
            yield Boundary(position, optional=False)
        elif position // (SPACING_PAGES * page_size) > (position - step) // (SPACING_PAGES * page_size):
            yield Boundary(position, optional=True)
