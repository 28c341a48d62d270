"""What the pages of ranks hold, told to them by the front: when it dies, the next one finds contexts in their caches.

A page is known from when it is full until it is written again. What a rank knows of its pages counts for one epoch; the
front tells it anew in the next.
"""

from collections.abc import Mapping

import numpy as np

from serving.pages import KEY_BYTES, Key
from serving.proto.moejax.v1 import link_pb2


class PageIndex:
    """A rank's side: the keys of its full pages. `hello` may be called from any thread."""

    def __init__(self) -> None:
        self._keys: dict[int, Key] = {}

    def note(self, full: link_pb2.FullPages) -> None:
        """Pages are full, and will not be written before somebody takes them for something else."""
        self._keys |= read(full)

    def wrote(self, pages: np.ndarray) -> None:
        """Pages, int `[n]` with any of them any number of times, are about to be written."""
        for page in set(pages.tolist()):
            self._keys.pop(page, None)

    def keep(self, pages: int) -> None:
        """Only the first so many pages are still there."""
        self._keys = {page: key for page, key in self._keys.items() if page < pages}

    def hello(self) -> link_pb2.FullPages:
        """For the next front."""
        return _message(dict(self._keys))


class PageNews:
    """The front's side: what each rank has not been told yet."""

    def __init__(self) -> None:
        self._told: dict[int, Mapping[int, Key]] = {}

    def again(self) -> None:
        """Everything, from now on: a plan has come into force."""
        self._told.clear()

    def of(self, rank: int, keys: Mapping[int, Key]) -> link_pb2.FullPages | None:
        """What a rank whose known pages are these is to be told next; None when it knows."""
        told = self._told.get(rank, {})
        if told is keys:
            return None
        self._told[rank] = keys
        new = {page: key for page, key in keys.items() if told.get(page) != key}
        return _message(new) if new else None


def read(full: link_pb2.FullPages) -> dict[int, Key]:
    """Keys by page."""
    keys = full.keys
    each = (keys[at : at + KEY_BYTES] for at in range(0, len(keys), KEY_BYTES))
    return dict(zip(np.frombuffer(full.pages, np.int32).tolist(), each, strict=True))


def _message(keys: Mapping[int, Key]) -> link_pb2.FullPages:
    return link_pb2.FullPages(pages=np.array(list(keys), np.int32).tobytes(), keys=b"".join(keys.values()))
