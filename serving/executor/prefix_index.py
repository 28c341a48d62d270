"""The keys of the full KV pages of each rank, sent to the ranks: the next front finds contexts in their caches by them.

A page is known from when it is full until it is written again. The keys that a rank knows are valid for one epoch; in
the next one the front sends them again (docs/decisions/0010).
"""

from collections.abc import Mapping

import numpy as np

from serving.engine.page_pool import KEY_BYTES, PageKey
from serving.proto.moejax.v1 import link_pb2


class PrefixIndex:
    """The rank's side: the keys of its full pages. `message` may be called from any thread."""

    def __init__(self) -> None:
        self._keys: dict[int, PageKey] = {}

    def add(self, full: link_pb2.FullPages) -> None:
        """These pages are full; they are not written again before they are used for another context."""
        self._keys |= read_pages(full)

    def invalidate(self, pages: np.ndarray) -> None:
        """Pages, int `[n]` with repetitions, are about to be written."""
        for page in set(pages.tolist()):
            self._keys.pop(page, None)

    def truncate(self, pages: int) -> None:
        """Only the first so many pages are kept."""
        self._keys = {page: key for page, key in self._keys.items() if page < pages}

    def message(self) -> link_pb2.FullPages:
        """The full pages as a message to the next front."""
        return _message(dict(self._keys))


class PrefixUpdates:
    """The front's side: the full pages that were not sent to each rank yet."""

    def __init__(self) -> None:
        self._sent: dict[int, Mapping[int, PageKey]] = {}

    def reset(self) -> None:
        """A plan has come into force: its ranks know no pages."""
        self._sent.clear()

    def update_for(self, rank: int, keys: Mapping[int, PageKey]) -> link_pb2.FullPages | None:
        """The message of the pages in `keys` that were not sent to a rank; None when all were."""
        sent = self._sent.get(rank, {})
        if sent is keys:
            return None
        self._sent[rank] = keys
        new = {page: key for page, key in keys.items() if sent.get(page) != key}
        return _message(new) if new else None


def read_pages(full: link_pb2.FullPages) -> dict[int, PageKey]:
    """The keys of a message, by page."""
    keys = full.keys
    each = (keys[at : at + KEY_BYTES] for at in range(0, len(keys), KEY_BYTES))
    return dict(zip(np.frombuffer(full.pages, np.int32).tolist(), each, strict=True))


def _message(keys: Mapping[int, PageKey]) -> link_pb2.FullPages:
    return link_pb2.FullPages(pages=np.array(list(keys), np.int32).tobytes(), keys=b"".join(keys.values()))
