"""The pages of one rank's key/value cache: who holds them, and what those hold that nobody does. A value.

A full page is known by a key, a digest of every token up to its end, so equal prefixes have equal keys. A known
page may be held by several sequences at once. When the last lets go it is kept, with its content, until its room
is wanted: then the page that was let go first is taken.
"""

import collections
import dataclasses
import hashlib
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

Key = bytes
KEY_BYTES = 16


@dataclasses.dataclass(frozen=True, slots=True)
class PagePool:
    """Pages 0 .. total - 1. Each is in one of three places: `free` (holds nothing; the next to be taken stands last),
    `kept` (nobody's, with content; the next to be evicted stands first) or `holders` (page -> how many hold it).

    `keys` names the content of pages held or kept, where it is known, and `index` finds them by it.
    """

    total: int
    free: tuple[int, ...]
    kept: tuple[int, ...] = ()
    holders: Mapping[int, int] = dataclasses.field(default_factory=dict)
    keys: Mapping[int, Key] = dataclasses.field(default_factory=dict)
    index: Mapping[Key, int] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(cls, total: int) -> "PagePool":
        """A pool with every page free. Pages are handed out from 0 upwards."""
        if total < 0:
            raise ValueError(f"a rank cannot have {total} pages; give it 0 or more.")
        return cls(total, tuple(range(total - 1, -1, -1)))

    @classmethod
    def holding(cls, total: int, keys: Mapping[int, Key]) -> "PagePool":
        """A pool with the content of some pages known, and nobody's; the first to be known are kept longest."""
        index = {key: page for page, key in reversed(list(keys.items())) if page < total}
        keys = {page: key for key, page in index.items()}
        return dataclasses.replace(
            cls(total, tuple(page for page in range(total - 1, -1, -1) if page not in keys)),
            kept=tuple(keys),
            keys=keys,
            index=index,
        )

    @property
    def used(self) -> int:
        """How many pages somebody holds."""
        return len(self.holders)

    @property
    def available(self) -> int:
        """How many pages nobody holds."""
        return len(self.free) + len(self.kept)

    @property
    def extent(self) -> int:
        """Pages from the first on that have all content worth keeping among them."""
        return max((*self.holders, *self.kept), default=-1) + 1

    def match(self, keys: Iterable[Key]) -> tuple[int, ...]:
        """The pages of the longest beginning of `keys` that is here."""
        pages = []
        for key in keys:
            if (page := self.index.get(key)) is None:
                break
            pages.append(page)
        return tuple(pages)

    def available_beside(self, pages: Sequence[int]) -> int:
        """How many pages nobody would hold if somebody held these."""
        return self.available - sum(page not in self.holders for page in pages)

    def share(self, pages: Sequence[int]) -> "PagePool":
        """Hold known pages once more."""
        holders = dict(self.holders)
        for page in pages:
            assert page in self.keys, f"page {page} has no known content to share"
            holders[page] = holders.get(page, 0) + 1
        taken = set(pages)
        kept = tuple(page for page in self.kept if page not in taken)
        return dataclasses.replace(self, kept=kept, holders=holders)

    def alloc(self, count: int) -> tuple["PagePool", tuple[int, ...]]:
        """Take `count` pages to write on: free ones, then the kept ones in order. The caller has made sure that they
        are there."""
        assert 0 <= count <= self.available, f"{count} pages wanted, {self.available} of {self.total} available"
        evict = max(0, count - len(self.free))
        evicted, kept = self.kept[:evict], self.kept[evict:]
        left = len(self.free) - (count - evict)
        pages = (*reversed(self.free[left:]), *evicted)
        holders = dict(self.holders)
        holders.update(dict.fromkeys(pages, 1))
        keys, index = self.keys, self.index
        if evicted:
            gone = set(evicted)
            keys = {page: key for page, key in keys.items() if page not in gone}
            index = {key: page for key, page in index.items() if page not in gone}
        return PagePool(self.total, self.free[:left], kept, holders, keys, index), pages

    def seal(self, page: int, key: Key) -> "PagePool":
        """A held page is full and will not be written again. A second page of the same content stays unknown."""
        assert page in self.holders, f"page {page} is sealed by nobody who holds it"
        if key in self.index or page in self.keys:
            return self
        return dataclasses.replace(self, keys={**self.keys, page: key}, index={**self.index, key: page})

    def release(self, pages: Sequence[int]) -> "PagePool":
        """Let go of pages. Those with known content are kept, the last to be evicted last of all; of the rest, the
        first is the next to be taken."""
        holders, kept, free = dict(self.holders), [], []
        for page in reversed(pages):  # a page is of no use without those before it: the last goes first
            count = holders.pop(page, 0)
            assert count, f"page {page} is given back by nobody who holds it"
            if count > 1:
                holders[page] = count - 1
            elif page in self.keys:
                kept.append(page)
            else:
                free.append(page)
        return dataclasses.replace(self, free=(*self.free, *free), kept=(*self.kept, *kept), holders=holders)


def page_keys(tokens: Sequence[int], page_size: int, before: Key) -> tuple[Key, ...]:
    """The keys of the full pages of `tokens`; `before` is the key of the page before them, or of what every first
    page depends on."""
    keys = []
    for start in range(0, len(tokens) - page_size + 1, page_size):
        page = np.asarray(tokens[start : start + page_size], np.int64).tobytes()
        before = hashlib.blake2b(page, digest_size=KEY_BYTES, key=before).digest()
        keys.append(before)
    return tuple(keys)


def check_pages(pool: PagePool, held: Iterable[int]) -> None:
    """Every page is free, kept or held, in one place, and held as often as it occurs in `held`. Raises
    AssertionError naming the pages that are not."""
    holders = collections.Counter(held)
    pages = sorted((*pool.free, *pool.kept, *holders))
    twice = sorted(page for page, count in collections.Counter(pages).items() if count > 1)
    missing = sorted(set(range(pool.total)) - set(pages))
    foreign = sorted(set(pages) - set(range(pool.total)))
    assert pages == list(range(pool.total)), f"pages in two places {twice}, lost {missing}, not ours {foreign}"
    wrong = sorted(page for page in holders if holders[page] != pool.holders.get(page))
    assert dict(holders) == dict(pool.holders), f"pages held otherwise than counted {wrong or sorted(pool.holders)}"
    assert {key: page for page, key in pool.keys.items()} == dict(pool.index), "a key does not lead to its page"
    assert pool.keys.keys() >= set(pool.kept), "a page is kept whose content nobody knows"
    assert not pool.keys.keys() & set(pool.free), "a page is free and has content"
