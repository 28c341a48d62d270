"""The requests of one step, and their form as arrays for a rank's compiled program.

A bucket has B decode segments of one row, then G tiles of 32 rows: R = B + 32 G rows and Z = B + G segments. A chunk
of a prompt takes consecutive tiles; a step may have chunks of several prompts. A request with drafts takes consecutive
decode segments: one for its last token, and one for each draft, which sees the rows before it as new rows of the step.
"""

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

import numpy as np

from planner.plan.step_layout import DROPPED, TILE
from serving.engine.snapshots import SnapshotWrite
from serving.protocol.request import LogitsParams
from serving.protocol.sampling import ResolvedSampling, TopLogprobs

PLACEHOLDER_TOKEN = -1
"""Takes the place of a token that a step in flight will sample."""


class StepBucket(NamedTuple):
    """A shape the step program is compiled for: `decode` rows and `tiles` of 32 rows on every rank."""

    decode: int
    tiles: int

    @property
    def rows(self) -> int:
        return self.decode + TILE * self.tiles

    @property
    def segments(self) -> int:
        return self.decode + self.tiles


class StepResult(NamedTuple):
    """The result of one step for one request: the next token (-1 when none was sampled), its log-probability, the
    likeliest tokens in its place, and (log-probability, likeliest tokens) of each target. `after_drafts` has the result
    after each draft, which counts only if the draft is the token that was sampled before it. `guesses` are what
    the model has of the tokens after this one."""

    token: int
    logprob: float
    top: TopLogprobs = ()
    scores: tuple[tuple[float, TopLogprobs], ...] = ()
    after_drafts: tuple["StepResult", ...] = ()
    guesses: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True, slots=True)
class ScheduledRequest:
    """The part of one request that a step computes: `tokens` at positions from `start` on. `samples` says whether the
    step samples the next token.

    `targets` are the tokens to score after each of `tokens`, -1 for none; empty when nothing is scored.
    `logits_params` are set where choosing the next token takes more than temperature and filters. The seed enters the
    program modulo 2**32. `drafts` are guesses of the tokens after a single token, each a row of its own. `states` are
    the places of the states that the step reads and writes, if requests have any. `snapshots` are written
    besides: each after a tile, or after its last row and then in place of the state that it writes.
    """

    request_id: str
    start: int
    tokens: tuple[int, ...]
    pages: tuple[int, ...]
    samples: bool
    sampling: ResolvedSampling
    targets: tuple[int, ...] = ()
    logits_params: LogitsParams | None = None
    drafts: tuple[int, ...] = ()
    states: tuple[int, int] | None = None
    snapshots: tuple[SnapshotWrite, ...] = ()

    @property
    def rows(self) -> int:
        """Number of rows, and of KV entries that the step writes."""
        return len(self.tokens) + len(self.drafts)

    @property
    def tiles(self) -> int:
        """Number of prefill tiles; 0 for a single token, which takes a decode row instead."""
        return 0 if len(self.tokens) == 1 else -(-len(self.tokens) // TILE)


@dataclasses.dataclass(frozen=True)
class Batch:
    """A step: every rank runs the program of `bucket` on the requests that `scheduled` has for it, if any."""

    step: int
    epoch: int
    bucket: StepBucket
    scheduled: Mapping[int, tuple[ScheduledRequest, ...]]
    degraded: bool = False
    """The step runs while experts are masked."""
    weights_version: str = "0"
    """The label of the weights that compute it."""
    skip_drafts: bool = False
    """The model's layer of multi-token prediction, if it has one, does not run after the step."""

    @property
    def required_bucket(self) -> StepBucket:
        """The smallest bucket that would hold this step."""
        return required_bucket(self.scheduled.values())

    @property
    def rows(self) -> int:
        """Number of rows that all ranks together compute."""
        return self.bucket.rows * len(self.scheduled)

    @property
    def rows_filled(self) -> int:
        """Number of those rows that are a token of a request; the others are padding."""
        return sum(item.rows for work in self.scheduled.values() for item in work)


def required_bucket(work: Iterable[tuple[ScheduledRequest, ...]]) -> StepBucket:
    """The most decode rows and the most tiles of any rank."""
    most_rows = most_tiles = 0
    for part in work:
        rows = tiles = 0
        for item in part:  # one pass: with a thousand ranks this counts in the front's time
            count = item.tiles
            tiles += count
            rows += 0 if count else item.rows
        most_rows, most_tiles = max(most_rows, rows), max(most_tiles, tiles)
    return StepBucket(most_rows, most_tiles)


class RequestRows(NamedTuple):
    """The rows of a scheduled request in a step: its first row and its first segment. Each row of drafts is a segment
    of its own."""

    scheduled: ScheduledRequest
    row: int
    segment: int

    @property
    def last(self) -> int:
        """The last segment before those of drafts; its logits choose the next token."""
        return self.segment + max(self.scheduled.tiles, 1) - 1


def layout(bucket: StepBucket, work: tuple[ScheduledRequest, ...]) -> Iterator[RequestRows]:
    """The rows of each request, in order: decode rows from row 0, chunks from tile 0."""
    rows, tiles = sum(item.rows for item in work if not item.tiles), sum(item.tiles for item in work)
    assert rows <= bucket.decode, f"{rows} decode rows do not fit in {bucket}"
    assert tiles <= bucket.tiles, f"{tiles} tiles do not fit in {bucket}"
    row, tile = 0, 0
    for item in work:
        if item.tiles:
            yield RequestRows(item, bucket.decode + TILE * tile, bucket.decode + tile)
            tile += item.tiles
        else:
            yield RequestRows(item, row, row)
            row += item.rows


def token_sources(before: Batch, batch: Batch, rank: int) -> np.ndarray:
    """For each decode row of a rank, the segment of the step before that samples its token, -1 where the token is
    known; int32. The step before has no drafts for a request with such a row."""
    last = {placed.scheduled.request_id: placed.last for placed in _segments(before, rank)}
    sources: list[int] = []
    for item in (placed.scheduled for placed in _segments(batch, rank) if not placed.scheduled.tiles):
        sources.append(last[item.request_id] if item.tokens[0] == PLACEHOLDER_TOKEN else -1)
        sources += [-1] * len(item.drafts)
    return np.array(sources, np.int32)


def _segments(batch: Batch, rank: int) -> Iterator[RequestRows]:
    return layout(batch.bucket, batch.scheduled.get(rank, ()))


def prepare_inputs(batch: Batch, rank: int, *, page_size: int, max_pages: int) -> dict[str, np.ndarray]:
    """The rank's part of a step as the arrays its program takes.

    int32 [R]: `tokens`, `positions` (-1 padding), `write` (flat cache entry, DROPPED for padding), `read` (1 where a
    token is chosen or scored after the row).
    int32 [Z, max_pages]: `page_table`.
    int32 [Z]: `cached` (tokens of the sequence in the cache before the step), `new_base` (row of its first
    new token), `sample_row` (row whose logits give the next token), `sample_position` (where that token will
    stand), `top_k`. float32 [Z]: `temperature`, `top_p`, `min_p`. uint32 [Z]: `seed`.
    A segment that does not sample is greedy and reads its own first row.

    Where requests have states also int32 [Z]: `state_read` (place of the state that the segment's chunk begins with)
    and `state_write` (where the state after the segment goes; DROPPED where a chunk goes on without a snapshot, and for
    padding).
    """
    bucket, scheduled = batch.bucket, batch.scheduled[rank]
    arrays = _padding(bucket, max_pages, states=any(item.states for item in scheduled))
    by_row = tokens, positions, write, read = [arrays[name] for name in ("tokens", "positions", "write", "read")]
    decode: list[tuple[int, int, int, bool, int, int]] = []
    sampling: list[tuple[int, ScheduledRequest, int]] = []
    for placed in layout(bucket, scheduled):
        item, row, segment = placed
        stop = placed.last + 1 + len(item.drafts)
        arrays["page_table"][segment:stop, : len(item.pages)] = item.pages
        if item.states:
            arrays["state_read"][segment:stop], arrays["state_write"][placed.last] = item.states
            for position, place, _ in item.snapshots:
                arrays["state_write"][segment + (position - item.start - 1) // TILE] = place
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
            is_read = item.samples or max(item.targets, default=-1) >= 0
            for position, token in enumerate((*item.tokens, *item.drafts), item.start):
                page, offset = divmod(position, page_size)
                decode.append((token, position, item.pages[page] * page_size + offset, is_read, item.start, row))
        if item.samples:
            after = item.start + len(item.tokens)
            sampling += ((placed.last + n, item, after + n) for n in range(1 + len(item.drafts)))
    if decode:
        rows = np.array(decode, np.int32)
        for array, values in zip((*by_row, arrays["cached"], arrays["new_base"]), rows.T, strict=True):
            array[: len(rows)] = values
    if sampling:
        _set_sampling(arrays, sampling)
    return arrays


def collect_results(
    batch: Batch,
    rank: int,
    tokens: np.ndarray,
    logprobs: np.ndarray,
    top: tuple[np.ndarray, np.ndarray] | None = None,
    scores: Iterable[tuple[np.ndarray, np.ndarray, np.ndarray]] = (),
    guesses: np.ndarray | None = None,
) -> dict[str, StepResult]:
    """Results by request id, for the requests that sample or have targets.

    `tokens` and `logprobs` are [Z]. `top` are the likeliest tokens and their log-probabilities [Z, K]; a rank sends
    them when any segment needs logits processing. `scores` has, for each tile with targets, log-probabilities [32],
    then likeliest tokens as in `top`. `guesses` are those of a layer of multi-token prediction [Z, n], -1 for none.
    """
    chosen, values, tile_scores = np.asarray(tokens).tolist(), np.asarray(logprobs).tolist(), iter(scores)
    ahead = [] if guesses is None else guesses.tolist()
    results = {}
    for placed in layout(batch.bucket, batch.scheduled[rank]):
        item, last = placed.scheduled, placed.last
        scored: list[tuple[float, TopLogprobs]] = []
        for at in range(0, len(item.targets), TILE):
            rows = [i for i, target in enumerate(item.targets[at : at + TILE]) if target >= 0]
            if rows:
                given, ids, values_of = next(tile_scores)
                scored += ((float(given[i]), _top(ids, values_of, i, item.sampling.prompt_logprobs or 0)) for i in rows)
        if item.samples:
            count = item.sampling.top_logprobs
            first, *others = (
                StepResult(
                    chosen[at],
                    values[at],
                    _top(*top, at, count) if top is not None else (),
                    guesses=tuple(itertools.takewhile(lambda token: token >= 0, ahead[at])) if ahead else (),
                )
                for at in range(last, last + 1 + len(item.drafts))
            )
            results[item.request_id] = first._replace(scores=tuple(scored), after_drafts=tuple(others))
        elif scored:
            results[item.request_id] = StepResult(-1, 0.0, (), tuple(scored))
    return results


def _top(tokens: np.ndarray, logprobs: np.ndarray, row: int, count: int) -> TopLogprobs:
    return tuple(zip(tokens[row, :count].tolist(), logprobs[row, :count].tolist(), strict=True))


_NO_STATES = {"state_read": 0, "state_write": DROPPED}
"""The places of the states that padding reads and writes."""


def _padding(bucket: StepBucket, max_pages: int, *, states: bool = False) -> dict[str, np.ndarray]:
    """The inputs of a rank without requests; `states` says whether requests have any."""
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
        **({name: np.full(count, place, np.int32) for name, place in _NO_STATES.items()} if states else {}),
    }


def _set_sampling(arrays: dict[str, np.ndarray], sampling: list[tuple[int, ScheduledRequest, int]]) -> None:
    """Set how segments sample: (segment, request, position of the token) each."""
    at = [segment for segment, _, _ in sampling]
    work = [item for _, item, _ in sampling]
    arrays["temperature"][at] = [item.sampling.temperature for item in work]
    arrays["top_k"][at] = [item.sampling.top_k for item in work]
    arrays["top_p"][at] = [item.sampling.top_p for item in work]
    arrays["min_p"][at] = [item.sampling.min_p for item in work]
    arrays["seed"][at] = [item.sampling.seed & 0xFFFFFFFF for item in work]
    arrays["sample_position"][at] = [position for _, _, position in sampling]
