"""The pages of one rank's key/value cache: which are free. A value; taking and giving back make a new one."""

import dataclasses
import itertools
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True, slots=True)
class PagePool:
    """Pages 0 .. total - 1, of which those in `free` belong to nobody; the next to be taken stands last."""

    total: int
    free: tuple[int, ...]

    @classmethod
    def of(cls, total: int) -> "PagePool":
        """A pool with every page free. Pages are handed out from 0 upwards."""
        if total < 0:
            raise ValueError(f"a rank cannot have {total} pages; give it 0 or more.")
        return cls(total, tuple(range(total - 1, -1, -1)))

    @property
    def used(self) -> int:
        """How many pages somebody owns."""
        return self.total - len(self.free)

    def alloc(self, count: int) -> tuple["PagePool", tuple[int, ...]]:
        """Take `count` pages. The caller has made sure that they are there."""
        assert 0 <= count <= len(self.free), f"{count} pages wanted, {len(self.free)} of {self.total} free"
        keep = len(self.free) - count
        return PagePool(self.total, self.free[:keep]), self.free[: keep - 1 if keep else None : -1]

    def release(self, pages: Sequence[int]) -> "PagePool":
        """Give pages back; the first of them is the next to be taken."""
        pool = PagePool(self.total, self.free + tuple(reversed(pages)))
        assert len(pool.free) <= self.total, f"{len(pool.free)} pages free in a pool of {self.total}"
        return pool


def check_pages(pool: PagePool, owned: Sequence[int]) -> None:
    """Every page is either free or in `owned`, once. Raises AssertionError naming the pages that are not."""
    pages = sorted((*pool.free, *owned))
    twice = sorted({a for a, b in itertools.pairwise(pages) if a == b})
    missing = sorted(set(range(pool.total)) - set(pages))
    foreign = sorted(set(pages) - set(range(pool.total)))
    assert pages == list(range(pool.total)), f"pages held twice {twice}, lost {missing}, not ours {foreign}"
