"""The pages of one rank's KV cache, with reference counts and a prefix index. A value.

The key of a full page is a digest of every token up to its end, so equal prefixes have equal keys. Several sequences
may hold a page whose key is known. When the last of them releases it, the page keeps its content until its room is
needed; the page released first is evicted first.

With layers whose context is a state a prefix can be shared up to a page behind which there is a snapshot of the state
(serving/engine/snapshots.py). A page that is evicted takes its snapshot with it.
"""

import collections
import dataclasses
import hashlib
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from serving.engine.snapshots import Snapshots

PageKey = bytes
KEY_BYTES = 16


@dataclasses.dataclass(frozen=True, slots=True)
class PagePool:
    """Pages 0 .. total - 1. Each is in one of three places: `free` (without content; the last is the next to be
    allocated), `evictable` (held by nobody, with content; the first is the next to be evicted) or `ref_counts` (page
    -> number of holders).

    `keys` has the keys of held and evictable pages, where they are known; `index` is its inverse. `snapshots` are those
    of the states after such pages.
    """

    total: int
    free: tuple[int, ...]
    evictable: tuple[int, ...] = ()
    ref_counts: Mapping[int, int] = dataclasses.field(default_factory=dict)
    keys: Mapping[int, PageKey] = dataclasses.field(default_factory=dict)
    index: Mapping[PageKey, int] = dataclasses.field(default_factory=dict)
    snapshots: Snapshots = dataclasses.field(default_factory=Snapshots)

    @classmethod
    def empty(cls, total: int) -> "PagePool":
        """A pool in which every page is free. Pages are allocated from 0 upwards."""
        if total < 0:
            raise ValueError(f"a rank cannot have {total} pages; give it 0 or more.")
        return cls(total, tuple(range(total - 1, -1, -1)))

    @classmethod
    def with_cached_pages(
        cls, total: int, keys: Mapping[int, PageKey], snapshots: Mapping[int, PageKey] | None = None
    ) -> "PagePool":
        """A pool in which pages with known keys are evictable; the first of `keys` are evicted last. `snapshots` are
        the states after such pages, {place: key}."""
        index = {key: page for page, key in reversed(list(keys.items())) if page < total}
        keys = {page: key for key, page in index.items()}
        return dataclasses.replace(
            cls(total, tuple(page for page in range(total - 1, -1, -1) if page not in keys)),
            evictable=tuple(keys),
            keys=keys,
            index=index,
            snapshots=Snapshots({key: place for place, key in (snapshots or {}).items() if key in index}),
        )

    @property
    def used(self) -> int:
        """Number of held pages."""
        return len(self.ref_counts)

    @property
    def available(self) -> int:
        """Number of pages that nobody holds."""
        return len(self.free) + len(self.evictable)

    @property
    def extent(self) -> int:
        """Number of leading pages that include every held or evictable one."""
        return max((*self.ref_counts, *self.evictable), default=-1) + 1

    def match(self, keys: Iterable[PageKey], *, states: bool = False) -> tuple[int, ...]:
        """The pages of the longest prefix of `keys` that is in the pool, and with `states` ends at a snapshot."""
        pages = []
        for key in keys:
            if (page := self.index.get(key)) is None:
                break
            pages.append(page)
        return tuple(pages[: self.snapshots.last_of(map(self.keys.__getitem__, pages))] if states else pages)

    def available_after_sharing(self, pages: Sequence[int]) -> int:
        """Number of pages that nobody would hold if a sequence held these."""
        return self.available - sum(page not in self.ref_counts for page in pages)

    def share(self, pages: Sequence[int]) -> "PagePool":
        """Add a holder to pages with known keys."""
        holders = dict(self.ref_counts)
        for page in pages:
            assert page in self.keys, f"page {page} has no known content to share"
            holders[page] = holders.get(page, 0) + 1
        taken = set(pages)
        kept = tuple(page for page in self.evictable if page not in taken)
        return dataclasses.replace(self, evictable=kept, ref_counts=holders)

    def alloc(self, count: int) -> tuple["PagePool", tuple[int, ...]]:
        """Allocate `count` pages to write on: free ones, then evictable ones in order. The caller checks that they
        are available."""
        assert 0 <= count <= self.available, f"{count} pages wanted, {self.available} of {self.total} available"
        evict = max(0, count - len(self.free))
        evicted, evictable = self.evictable[:evict], self.evictable[evict:]
        left = len(self.free) - (count - evict)
        pages = (*reversed(self.free[left:]), *evicted)
        holders = dict(self.ref_counts)
        holders.update(dict.fromkeys(pages, 1))
        keys, index, snapshots = self.keys, self.index, self.snapshots
        if evicted:
            gone = set(evicted)
            snapshots = snapshots.without({keys[page] for page in evicted})
            keys = {page: key for page, key in keys.items() if page not in gone}
            index = {key: page for key, page in index.items() if page not in gone}
        return PagePool(self.total, self.free[:left], evictable, holders, keys, index, snapshots), pages

    def take(self, pages: Sequence[int]) -> "PagePool":
        """Hold free pages, to write on. The caller checks that they are free."""
        taken = set(pages)
        assert taken <= set(self.free), f"pages {sorted(taken.difference(self.free))} are not free"
        left = tuple(page for page in self.free if page not in taken)
        return dataclasses.replace(self, free=left, ref_counts={**self.ref_counts, **dict.fromkeys(pages, 1)})

    def seal(self, page: int, key: PageKey) -> "PagePool":
        """Record the key of a held page that is full. A second page with the same content stays without a key."""
        assert page in self.ref_counts, f"page {page} is sealed without a holder"
        if key in self.index or page in self.keys:
            return self
        return dataclasses.replace(self, keys={**self.keys, page: key}, index={**self.index, key: page})

    def release(self, pages: Sequence[int]) -> "PagePool":
        """Remove a holder from pages. Pages with known keys become evictable, the first page last; of the others, the
        first is the next to be allocated."""
        holders, kept, free = dict(self.ref_counts), [], []
        for page in reversed(pages):  # a page is of no use without those before it: the last goes first
            count = holders.pop(page, 0)
            assert count, f"page {page} is released without a holder"
            if count > 1:
                holders[page] = count - 1
            elif page in self.keys:
                kept.append(page)
            else:
                free.append(page)
        return dataclasses.replace(
            self, free=(*self.free, *free), evictable=(*self.evictable, *kept), ref_counts=holders
        )


def hash_pages(tokens: Sequence[int], page_size: int, before: PageKey) -> tuple[PageKey, ...]:
    """The keys of the full pages of `tokens`; `before` is the key of the page before them, or the root key."""
    keys = []
    for start in range(0, len(tokens) - page_size + 1, page_size):
        page = np.asarray(tokens[start : start + page_size], np.int64).tobytes()
        before = hashlib.blake2b(page, digest_size=KEY_BYTES, key=before).digest()
        keys.append(before)
    return tuple(keys)


def check_pages(pool: PagePool, held: Iterable[int]) -> None:
    """Check that every page is free, evictable or held, in one place only, and held as often as it occurs in `held`.
    Raises AssertionError naming the pages that are not."""
    holders = collections.Counter(held)
    pages = sorted((*pool.free, *pool.evictable, *holders))
    assert pages == list(range(pool.total)), _why_not_conserved(pool, pages)
    assert dict(holders) == dict(pool.ref_counts), _why_miscounted(pool, holders)
    assert {key: page for page, key in pool.keys.items()} == dict(pool.index), "a key does not lead to its page"
    assert pool.keys.keys() >= set(pool.evictable), "an evictable page has no key"
    assert not pool.keys.keys() & set(pool.free), "a page is free and has content"
    assert pool.index.keys() >= pool.snapshots.places.keys(), "a snapshot has no page"


def _why_not_conserved(pool: PagePool, pages: list[int]) -> str:
    twice = sorted(page for page, count in collections.Counter(pages).items() if count > 1)
    missing = sorted(set(range(pool.total)) - set(pages))
    foreign = sorted(set(pages) - set(range(pool.total)))
    return f"pages in two places {twice}, lost {missing}, not ours {foreign}"


def _why_miscounted(pool: PagePool, holders: Mapping[int, int]) -> str:
    wrong = sorted(page for page in holders if holders[page] != pool.ref_counts.get(page))
    return f"pages held otherwise than counted {wrong or sorted(pool.ref_counts)}"
