"""The numbers of sparse attention with an indexer, which planner and server share."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Indexer:
    """A lightning indexer (DeepSeek-V3.2, arXiv 2512.02556, section 2.1): a query attends to the `chosen` positions
    that score highest, by `heads` small queries and one key of `d_key` numbers per position, which is cached."""

    heads: int
    d_key: int
    chosen: int

    def parameters(self, hidden_size: int, query_size: int) -> int:
        """Parameters of one layer: queries, key and its norm, and the weight of each head."""
        return query_size * self.heads * self.d_key + hidden_size * (self.d_key + self.heads) + 2 * self.d_key
