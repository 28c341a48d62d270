"""A model whose answers can be worked out by hand, its requests, and the KV cache of a rank that runs it."""

import dataclasses
import itertools
import operator
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from planner.plan.step_layout import DROPPED, TILE
from serving.engine.batch import StepBucket
from serving.engine.limits import Limits
from serving.engine.logits import LogitsAdjustment, ScoredTile, logits_adjustment
from serving.protocol.prepared_model import PreparedModel
from serving.protocol.request import LogitsParams, Request
from serving.protocol.sampling import ResolvedSampling

VOCAB = 97

PREPARED = PreparedModel(
    name="fake",
    config="{}",
    folder="",
    store="",
    executables="",
    vocab_size=VOCAB,
    max_context=96,
    stop_tokens=(),
    bos_token=None,
    layers=7,
    moe_layers=2,
    experts=4,
    experts_per_token=1,
    parameters=1,
    expert_bytes=8,
    rest_bytes=8,
    cache_bytes_per_token=8,
    hidden_bytes=8,
    weights="float32",
)
"""The model as a server prepares it; nothing of it is on disk."""


PERIOD, VARIED = 4, 9
"""Under an odd seed the fake model repeats the token PERIOD places before, except where VARIED divides the place."""


WRONG = 5
"""Guesses of a layer of multi-token prediction are wrong at positions that it divides."""


def next_token(prefix: Iterable[int], seed: int, weights: int = 0) -> int:
    """The fake model: seed + 1 x first token + 2 x second token + ..., modulo VOCAB; 7 more for each version of the
    weights. Under an odd seed its text has a period, which a token of the first kind changes at every VARIED places, so
    that some drafts are right."""
    tokens = list(prefix)
    if seed % 2 and len(tokens) >= PERIOD and len(tokens) % VARIED:
        return (tokens[-PERIOD] + 7 * weights) % VOCAB
    return (seed % 2**32 + sum(map(operator.mul, tokens, itertools.count(1))) + 7 * weights) % VOCAB


def logprob_of(token: int) -> float:
    """The fake model is a 64th less sure of a token than of the one before it."""
    return -token / 64


def fake_logits(prefix: Iterable[int], seed: int) -> np.ndarray:
    """The fake model's view of the next token: 0 for its own, less by 1 for each step away from it, in a ring."""
    return -((np.arange(VOCAB) - next_token(prefix, seed)) % VOCAB).astype(np.float32)


def allowed_by(params: LogitsParams) -> np.ndarray:
    """The fake structured output: after k tokens, only every token that is k modulo 3 more than one of three."""
    bits = (np.arange(VOCAB) + len(params.generated)) % 3 == 0
    return np.packbits(np.pad(bits, (0, -VOCAB % 32)), bitorder="little").view(np.uint32)


def adjusted_token(logits: np.ndarray, row: LogitsAdjustment) -> int:
    """The likeliest token after penalties, biases and mask, computed the slow way."""
    adjusted = logits.copy()
    for token in row.seen:
        adjusted[token] = adjusted[token] / row.repetition if adjusted[token] > 0 else adjusted[token] * row.repetition
    for token, more in zip(row.tokens, row.add, strict=True):
        adjusted[token] += more
    if row.allowed.size:
        bits = np.unpackbits(row.allowed.view(np.uint8), bitorder="little")[:VOCAB]
        adjusted[bits == 0] = -np.inf
    return int(np.argmax(adjusted))


def score_of(prefix: Iterable[int], token: int) -> float:
    """The fake model's log-probability of a given token; it is not normalized."""
    return float(fake_logits(prefix, 0)[token])


def alone(request: Request, max_context: int) -> tuple[list[int], str]:
    """The tokens a request gets when it is the only one, and why it ends."""
    tokens = list(request.prompt)
    generated: list[int] = []
    while len(generated) < request.sampling.max_tokens and len(tokens) < max_context:
        token = next_token(tokens, request.sampling.seed)
        if request.sampling.needs_logits_processing(len(generated)):
            row = logits_adjustment(LogitsParams(request, tuple(generated)), allowed_by)
            token = adjusted_token(fake_logits(tokens, request.sampling.seed), row)
        if token in request.sampling.stop_tokens:
            return generated, "stop"
        tokens.append(token)
        generated.append(token)
    return generated, "length"


def small_limits(**changes: Any) -> Limits:
    """Limits under which everything happens within a few steps."""
    values: dict[str, Any] = {
        "page_size": 8,
        "max_context": 96,
        "max_queue": 12,
        "buckets": (StepBucket(2, 0), StepBucket(4, 0), StepBucket(2, 1), StepBucket(4, 2)),
        "tiles_while_decoding": 1,
    }
    return Limits(**values | changes)


def small_request(name: str, prompt: Iterable[int] = (1, 2, 3), **fields: Any) -> Request:
    """A request of 4 tokens with the given fields, of the request itself or of its sampling parameters."""
    own = {field.name for field in dataclasses.fields(Request)}
    values: dict[str, Any] = {"id": name, **{key: value for key, value in fields.items() if key in own}}
    others = {key: value for key, value in fields.items() if key not in own}
    sampling: dict[str, Any] = {"max_tokens": 4, "seed": 0, **others}
    return Request(prompt=tuple(prompt), sampling=ResolvedSampling(**sampling), **values)


_COUNT = np.arange(1 << 12)


class HandCache:
    """The KV cache of a rank. Its entries are tokens and positions, and the number of the weights that computed them;
    only `step` reads it and only `commit` writes it, as in the real programs. A step takes no entry of other weights
    than the rank has."""

    def __init__(self, pages: int, page_size: int) -> None:
        self.page_size = page_size
        self.token = np.full(pages * page_size, -1)
        self.position = np.full(pages * page_size, -1)
        self.states: dict[int, tuple[int, ...]] = {}
        """The tokens that each state was made of, by its place."""
        self.version = np.zeros(pages * page_size, int)
        self.weights = 0
        """The number of the weights that the rank has."""

    def step(
        self, arrays: Mapping[str, np.ndarray], logits_adjustments: Mapping[int, LogitsAdjustment]
    ) -> tuple[np.ndarray, np.ndarray]:
        """(tokens [Z], log-probabilities [Z]) from the cache and the new rows. 0 for segments of padding."""
        tokens = np.zeros(len(arrays["cached"]), np.int32)
        positions, sampled = arrays["positions"].tolist(), arrays["sample_position"].tolist()
        for segment, row in enumerate(arrays["sample_row"].tolist()):
            if positions[row] >= 0:
                prefix = self.prefix(arrays, segment, row)
                assert sampled[segment] in (0, len(prefix))
                seed = int(arrays["seed"][segment])
                tokens[segment] = next_token(prefix, seed, self.weights)
                if segment in logits_adjustments:
                    tokens[segment] = adjusted_token(fake_logits(prefix, seed), logits_adjustments[segment])
        return tokens, np.array([logprob_of(token) for token in tokens.tolist()], np.float32)

    def guesses(self, arrays: Mapping[str, np.ndarray], tokens: np.ndarray, count: int) -> np.ndarray:
        """The guesses of a layer of multi-token prediction [Z, count] after the sampled tokens [Z]: right but at
        positions that WRONG divides; -1 for segments that do not sample."""
        made = np.full((len(tokens), count), -1, np.int32)
        for segment in np.flatnonzero(arrays["sample_position"] > 0).tolist():
            prefix = [*self.prefix(arrays, segment, arrays["sample_row"][segment]), int(tokens[segment])]
            for nth in range(count):
                right = next_token(prefix, int(arrays["seed"][segment]), self.weights)
                prefix.append(right if len(prefix) % WRONG else (right + 1) % VOCAB)
                made[segment, nth] = prefix[-1]
        return made

    def prefix(self, arrays: Mapping[str, np.ndarray], segment: int, row: int) -> list[int]:
        """The tokens that `row` attends to, itself the last: those in the cache, then the step's own."""
        cached, base = int(arrays["cached"][segment]), int(arrays["new_base"][segment])
        tokens: list[int] = []
        if cached:
            at = _COUNT[:cached]
            page = arrays["page_table"][segment][at // self.page_size]
            entries = page * self.page_size + at % self.page_size
            assert self.position[entries].tolist() == at.tolist(), "the cache holds something else at these entries"
            versions = self.version[entries].tolist()
            assert versions == [self.weights] * cached, "the cache holds entries of other weights"
            tokens = self.token[entries].tolist()
            if "state_read" in arrays:
                found = self.states[int(arrays["state_read"][segment])]
                assert found == tuple(tokens), "the state is one of other tokens"
        new = slice(base, row + 1)
        assert arrays["positions"][new].tolist() == list(range(cached, cached + row + 1 - base))
        return [*tokens, *arrays["tokens"][new].tolist()]

    def scores(self, arrays: Mapping[str, np.ndarray], tile: ScoredTile) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of a tile's targets: log-probabilities [32], and of the alternatives the target itself [32, 1] twice."""
        segment = int(np.flatnonzero(arrays["new_base"] <= tile.row)[-1])  # segments are in order of rows
        given = np.zeros(TILE, np.float32)
        for i, target in enumerate(tile.targets):
            if target >= 0:
                given[i] = score_of(self.prefix(arrays, segment, tile.row + i), target)
        return given, tile.targets[:, None], given[:, None]

    def commit(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Write the step's rows into the cache, and the states after them."""
        if "state_write" in arrays:
            self.states |= self._new_states(arrays)
        rows = arrays["write"] != DROPPED
        positions, entries = arrays["positions"][rows], arrays["write"][rows]
        assert min(positions.tolist(), default=0) >= 0
        assert len(set(entries.tolist())) == len(entries), "two rows write one entry"
        self.token[entries] = arrays["tokens"][rows]
        self.position[entries] = positions
        self.version[entries] = self.weights

    def _new_states(self, arrays: Mapping[str, np.ndarray]) -> dict[int, tuple[int, ...]]:
        """The states that a step writes, by their place: those after the last row of a chunk."""
        found: dict[int, tuple[int, ...]] = {}
        decode = len(arrays["state_write"]) - _tiles(arrays)
        for segment in np.flatnonzero(arrays["state_write"] != DROPPED).tolist():
            start = segment if segment < decode else decode + TILE * (segment - decode)
            rows = arrays["positions"][start : start + (1 if segment < decode else TILE)]
            last = start + int((rows >= 0).sum()) - 1
            place = int(arrays["state_write"][segment])
            assert place not in found, "two requests write one state"
            found[place] = tuple(self.prefix(arrays, segment, last))
        return found


def _tiles(arrays: Mapping[str, np.ndarray]) -> int:
    """Tiles of a step, from the numbers of its rows and segments."""
    return (len(arrays["positions"]) - len(arrays["cached"])) // (TILE - 1)
