"""One step's work, and its form as arrays for a rank's compiled program.

A bucket has B decode segments of one row, then G tiles of 32 rows: R = B + 32 G rows and Z = B + G segments.
A chunk of a prompt takes consecutive tiles; a step may have chunks of several prompts.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

import numpy as np

from serving.request import Request, Top

UNKNOWN = -1
"""Stands for a token that a step in flight will make."""

TILE = 32
"""Rows of one prefill segment."""

DROPPED = 2**30
"""Cache entry of rows that are padding: beyond every cache, so that the write is dropped."""


class Bucket(NamedTuple):
    """A shape the step program is compiled for: `decode` rows and `tiles` of 32 rows on every rank."""

    decode: int
    tiles: int

    @property
    def rows(self) -> int:
        return self.decode + TILE * self.tiles

    @property
    def segments(self) -> int:
        return self.decode + self.tiles


class Shaped(NamedTuple):
    """A request whose next token is bent by what it asks for and has generated so far."""

    request: Request
    generated: tuple[int, ...]


class Result(NamedTuple):
    """What a step says of a request: the next token (-1 when it does not sample), its log-probability, the likeliest
    instead, and (log-probability, likeliest) of each target."""

    token: int
    logprob: float
    top: Top = ()
    scores: tuple[tuple[float, Top], ...] = ()


@dataclasses.dataclass(frozen=True, slots=True)
class Work:
    """What one step does for one request: `tokens` at positions from `start` on; `samples` the next one?

    `seed` enters the program modulo 2**32. `targets` are the tokens to score after each of `tokens`, -1 for none;
    empty when there are none. `shaped` where the choice of the next one takes more than the fields here.
    `top` and `prompt_top` are how many of the likeliest tokens to tell.
    """

    request_id: str
    start: int
    tokens: tuple[int, ...]
    pages: tuple[int, ...]
    samples: bool
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    seed: int
    targets: tuple[int, ...] = ()
    shaped: Shaped | None = None
    top: int = 0
    prompt_top: int = 0

    @property
    def tiles(self) -> int:
        """Prefill tiles it takes; a single token takes a decode row instead."""
        return 0 if len(self.tokens) == 1 else -(-len(self.tokens) // TILE)


@dataclasses.dataclass(frozen=True)
class Batch:
    """A step: every rank runs the program of `bucket` on its own `work`, which may be empty."""

    step: int
    epoch: int
    bucket: Bucket
    work: Mapping[int, tuple[Work, ...]]
    degraded: bool = False
    """It runs while experts are masked."""

    @property
    def wanted(self) -> Bucket:
        """What the bucket had to cover."""
        return wanted(self.work.values())

    @property
    def rows(self) -> int:
        """Rows that all ranks together compute."""
        return self.bucket.rows * len(self.work)

    @property
    def filled(self) -> int:
        """Of these, rows that are a token of some work; the others are padding."""
        return sum(len(item.tokens) for work in self.work.values() for item in work)


def wanted(work: Iterable[tuple[Work, ...]]) -> Bucket:
    """The most decode rows and the most tiles of any rank."""
    tiles = [[item.tiles for item in part] for part in work]
    return Bucket(max(part.count(0) for part in tiles), max(sum(part) for part in tiles))


class Placed(NamedTuple):
    """Work at its place in a step: its first row and its first segment."""

    work: Work
    row: int
    segment: int

    @property
    def last(self) -> int:
        """Its last segment, the one that chooses the next token."""
        return self.segment + max(self.work.tiles, 1) - 1


def segments(bucket: Bucket, work: tuple[Work, ...]) -> Iterator[Placed]:
    """Each at its place, decode rows from 0 and chunks from tile 0, in order."""
    rows, tiles = sum(not item.tiles for item in work), sum(item.tiles for item in work)
    assert rows <= bucket.decode, f"{rows} decode rows do not fit in {bucket}"
    assert tiles <= bucket.tiles, f"{tiles} tiles do not fit in {bucket}"
    row, tile = 0, 0
    for item in work:
        if item.tiles:
            yield Placed(item, bucket.decode + TILE * tile, bucket.decode + tile)
            tile += item.tiles
        else:
            yield Placed(item, row, row)
            row += 1


def sources(before: Batch, batch: Batch, rank: int) -> np.ndarray:
    """For each of the rank's decode rows the segment of the step before that chooses its token, -1 where the token is
    known; int32."""
    last = {placed.work.request_id: placed.last for placed in _segments(before, rank)}
    rows = [placed.work for placed in _segments(batch, rank) if not placed.work.tiles]
    return np.array([last[item.request_id] if item.tokens[0] == UNKNOWN else -1 for item in rows], np.int32)


def _segments(batch: Batch, rank: int) -> Iterator[Placed]:
    return segments(batch.bucket, batch.work.get(rank, ()))


def assemble(batch: Batch, rank: int, *, page_size: int, max_pages: int) -> dict[str, np.ndarray]:
    """The rank's part of a step as the arrays its program takes.

    int32 [R]: `tokens`, `positions` (-1 padding), `write` (flat cache entry, DROPPED for padding), `read` (1 where a
    token is chosen or scored after the row).
    int32 [Z, max_pages]: `page_table`.
    int32 [Z]: `cached` (tokens of the sequence in the cache before the step), `new_base` (row of its first
    new token), `sample_row` (row whose logits give the next token), `sample_position` (where that token will
    stand), `top_k`. float32 [Z]: `temperature`, `top_p`, `min_p`. uint32 [Z]: `seed`.
    A segment that does not sample is greedy and reads its own first row.
    """
    bucket, work = batch.bucket, batch.work[rank]
    arrays = _padding(bucket, max_pages)
    by_row = tokens, positions, write, read = [arrays[name] for name in ("tokens", "positions", "write", "read")]
    decode, sampling = [], []
    for placed in segments(bucket, work):
        item, row, segment = placed
        stop = placed.last + 1
        arrays["page_table"][segment:stop, : len(item.pages)] = item.pages
        if item.tiles:
            count = len(item.tokens)
            at = np.arange(item.start, item.start + count)
            tokens[row : row + count] = item.tokens
            positions[row : row + count] = at
            write[row : row + count] = np.array(item.pages)[at // page_size] * page_size + at % page_size
            arrays["cached"][segment:stop] = item.start
            arrays["new_base"][segment:stop] = row
            read[row : row + len(item.targets)] = np.array(item.targets, np.int32) >= 0
            if item.samples:
                arrays["sample_row"][placed.last] = row + count - 1
                read[row + count - 1] = 1
        else:
            page, offset = divmod(item.start, page_size)
            is_read = item.samples or max(item.targets, default=-1) >= 0
            decode.append((item.tokens[0], item.start, item.pages[page] * page_size + offset, is_read))
        if item.samples:
            sampling.append((placed.last, item))
    if decode:
        rows = np.array(decode, np.int32)
        for array, values in zip(by_row, rows.T, strict=True):
            array[: len(rows)] = values
        arrays["cached"][: len(rows)] = rows[:, 1]
    if sampling:
        _set_sampling(arrays, sampling)
    return arrays


def harvest(
    batch: Batch,
    rank: int,
    tokens: np.ndarray,
    logprobs: np.ndarray,
    top: tuple[np.ndarray, np.ndarray] | None = None,
    scores: Iterable[tuple[np.ndarray, np.ndarray, np.ndarray]] = (),
) -> dict[str, Result]:
    """Results by request id, of the work that samples or has targets.

    `tokens` and `logprobs` are [Z]; `top` the likeliest tokens and their log-probabilities [Z, K], which the rank
    gives when any segment is shaped; `scores` has log-probabilities [32], then as `top`, of each tile with targets.
    """
    chosen, values, told = np.asarray(tokens).tolist(), np.asarray(logprobs).tolist(), iter(scores)
    results = {}
    for placed in segments(batch.bucket, batch.work[rank]):
        item, last = placed.work, placed.last
        scored: list[tuple[float, Top]] = []
        for at in range(0, len(item.targets), TILE):
            wanted = [i for i, target in enumerate(item.targets[at : at + TILE]) if target >= 0]
            if wanted:
                given, ids, values_of = next(told)
                scored += ((float(given[i]), _top(ids, values_of, i, item.prompt_top)) for i in wanted)
        if item.samples:
            best = _top(*top, last, item.top) if top is not None else ()
            results[item.request_id] = Result(chosen[last], values[last], best, tuple(scored))
        elif scored:
            results[item.request_id] = Result(-1, 0.0, (), tuple(scored))
    return results


def _top(tokens: np.ndarray, logprobs: np.ndarray, row: int, count: int) -> Top:
    return tuple(zip(tokens[row, :count].tolist(), logprobs[row, :count].tolist(), strict=True))


def _padding(bucket: Bucket, max_pages: int) -> dict[str, np.ndarray]:
    """The arrays of a rank that has nothing to do."""
    rows, count = bucket.rows, bucket.segments
    first_row = np.arange(count, dtype=np.int32)
    first_row[bucket.decode :] += (TILE - 1) * np.arange(bucket.tiles, dtype=np.int32)
    return {
        "tokens": np.zeros(rows, np.int32),
        "positions": np.full(rows, -1, np.int32),
        "page_table": np.zeros((count, max_pages), np.int32),
        "cached": np.zeros(count, np.int32),
        "new_base": first_row,
        "write": np.full(rows, DROPPED, np.int32),
        "sample_row": first_row.copy(),
        "temperature": np.zeros(count, np.float32),
        "top_k": np.zeros(count, np.int32),
        "top_p": np.ones(count, np.float32),
        "min_p": np.zeros(count, np.float32),
        "seed": np.zeros(count, np.uint32),
        "sample_position": np.zeros(count, np.int32),
        "read": np.zeros(rows, np.int32),
    }


def _set_sampling(arrays: dict[str, np.ndarray], sampling: list[tuple[int, Work]]) -> None:
    at = [segment for segment, _ in sampling]
    work = [item for _, item in sampling]
    arrays["temperature"][at] = [item.temperature for item in work]
    arrays["top_k"][at] = [item.top_k for item in work]
    arrays["top_p"][at] = [item.top_p for item in work]
    arrays["min_p"][at] = [item.min_p for item in work]
    arrays["seed"][at] = [item.seed & 0xFFFFFFFF for item in work]
    arrays["sample_position"][at] = [item.start + len(item.tokens) for item in work]
