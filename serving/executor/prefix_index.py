"""The keys of the full KV pages of each rank, sent to the ranks: the next front finds contexts in their caches by them.

A page is known from when it is full until it is written again, and so is the snapshot of a state, which has the key of
the page that it is behind. The keys that a rank knows are valid for one epoch; in
the next one the front sends them again (docs/decisions/0010).
"""

from collections.abc import Iterable, Mapping

import numpy as np

from serving.engine.page_pool import KEY_BYTES, PageKey
from serving.proto.moejax.v1 import link_pb2

NO_SNAPSHOTS: Mapping[PageKey, int] = {}


class PrefixIndex:
    """The rank's side: the keys of its full pages and of its snapshots. `message` may be called from any thread."""

    def __init__(self) -> None:
        self._keys: dict[int, PageKey] = {}
        self._snapshots: dict[int, PageKey] = {}

    def add(self, full: link_pb2.FullPages) -> None:
        """These pages are full; they are not written again before they are used for another context."""
        self._keys |= read_pages(full)
        self._snapshots |= read_snapshots(full)

    def invalidate(self, pages: np.ndarray) -> None:
        """Pages, int `[n]` with repetitions, are about to be written."""
        for page in set(pages.tolist()):
            self._keys.pop(page, None)

    def invalidate_snapshots(self, places: np.ndarray) -> None:
        """States, int `[n]`, are about to be written to these places."""
        for place in self._snapshots.keys() & set(places.tolist()):
            self._snapshots.pop(place, None)

    def truncate(self, pages: int) -> None:
        """Only the first so many pages are kept, and the snapshots behind them."""
        self._keys = {page: key for page, key in self._keys.items() if page < pages}
        left = set(self._keys.values())
        self._snapshots = {place: key for place, key in self._snapshots.items() if key in left}

    def message(self) -> link_pb2.FullPages:
        """The full pages and the snapshots as a message to the next front."""
        return _message(dict(self._keys), dict(self._snapshots))


class PrefixUpdates:
    """The front's side: the full pages and snapshots that were not sent to each rank yet."""

    def __init__(self) -> None:
        self._sent: dict[int, tuple[Mapping[int, PageKey], Mapping[PageKey, int]]] = {}

    def reset(self) -> None:
        """A plan has come into force: its ranks know no pages."""
        self._sent.clear()

    def update_for(
        self, rank: int, keys: Mapping[int, PageKey], snapshots: Mapping[PageKey, int] = NO_SNAPSHOTS
    ) -> link_pb2.FullPages | None:
        """The message of the pages in `keys`, and of the `snapshots`, {key: place}, that were not sent to a rank; None
        when all were."""
        sent, sent_snapshots = self._sent.get(rank, ({}, NO_SNAPSHOTS))
        if sent is keys and sent_snapshots is snapshots:
            return None
        self._sent[rank] = keys, snapshots
        new = {page: key for page, key in keys.items() if sent.get(page) != key}
        taken = {place: key for key, place in snapshots.items() if sent_snapshots.get(key) != place}
        return _message(new, taken) if new or taken else None


def read_pages(full: link_pb2.FullPages) -> dict[int, PageKey]:
    """The keys of a message, by page."""
    return _read(full.pages, full.keys)


def read_snapshots(full: link_pb2.FullPages) -> dict[int, PageKey]:
    """The keys of the pages that a message's snapshots are behind, by place."""
    return _read(full.snapshots, full.snapshot_keys)


def _read(numbers: bytes, keys: bytes) -> dict[int, PageKey]:
    each = (keys[at : at + KEY_BYTES] for at in range(0, len(keys), KEY_BYTES))
    return dict(zip(np.frombuffer(numbers, np.int32).tolist(), each, strict=True))


def _message(pages: Mapping[int, PageKey], snapshots: Mapping[int, PageKey]) -> link_pb2.FullPages:
    return link_pb2.FullPages(
        pages=_bytes(pages),
        keys=b"".join(pages.values()),
        snapshots=_bytes(snapshots),
        snapshot_keys=b"".join(snapshots.values()),
    )


def _bytes(numbers: Iterable[int]) -> bytes:
    return np.array(list(numbers), np.int32).tobytes()
