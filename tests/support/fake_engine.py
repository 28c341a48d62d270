"""A model whose answers can be worked out by hand, ranks that run it, an engine driven event by event."""

import dataclasses
from collections.abc import Collection, Iterable, Mapping

import numpy as np

from serving.batch import DROPPED, TILE, UNKNOWN, Batch, Bucket, Result, Shaped, assemble, harvest, segments
from serving.engine import (
    EngineState,
    Limits,
    Output,
    adopt,
    apply,
    cancel,
    check_integrity,
    expire,
    lose,
    submit,
)
from serving.errors import NoCapacity
from serving.request import Finished, Request, Scored, Token
from serving.scheduler import schedule
from serving.shaping import RowShape, Tile, row_shape, shapes, tiles

VOCAB = 97


def next_token(prefix: Iterable[int], seed: int) -> int:
    """The fake model: seed + 1 x first token + 2 x second token + ..., modulo VOCAB."""
    return (seed % 2**32 + sum(place * token for place, token in enumerate(prefix, 1))) % VOCAB


def logprob_of(token: int) -> float:
    """The fake model is a 64th less sure of a token than of the one before it."""
    return -token / 64


def fake_logits(prefix: Iterable[int], seed: int) -> np.ndarray:
    """The fake model's view of the next token: 0 for its own, less by 1 for each step away from it, in a ring."""
    return -((np.arange(VOCAB) - next_token(prefix, seed)) % VOCAB).astype(np.float32)


def allowed_by(shaped: Shaped) -> np.ndarray:
    """The fake guide: after k tokens, only every token that is k modulo 3 more than one of three."""
    bits = (np.arange(VOCAB) + len(shaped.generated)) % 3 == 0
    return np.packbits(np.pad(bits, (0, -VOCAB % 32)), bitorder="little").view(np.uint32)


def shaped_token(logits: np.ndarray, row: RowShape) -> int:
    """The likeliest token after penalties, biases and mask, computed the slow way."""
    bent = logits.copy()
    for token in row.seen:
        bent[token] = bent[token] / row.repetition if bent[token] > 0 else bent[token] * row.repetition
    for token, more in zip(row.tokens, row.add, strict=True):
        bent[token] += more
    if row.allowed.size:
        bits = np.unpackbits(row.allowed.view(np.uint8), bitorder="little")[:VOCAB]
        bent[bits == 0] = -np.inf
    return int(np.argmax(bent))


def score_of(prefix: Iterable[int], token: int) -> float:
    """The fake model's log-probability of a given token; it is not normalized."""
    return float(fake_logits(prefix, 0)[token])


def alone(request: Request, max_context: int) -> tuple[list[int], str]:
    """The tokens a request gets when it is the only one, and why it ends."""
    tokens = list(request.prompt)
    generated: list[int] = []
    while len(generated) < request.max_tokens and len(tokens) < max_context:
        token = next_token(tokens, request.seed)
        if request.is_shaped(len(generated)):
            row = row_shape(Shaped(request, tuple(generated)), allowed_by)
            token = shaped_token(fake_logits(tokens, request.seed), row)
        if token in request.stop_tokens:
            return generated, "stop"
        tokens.append(token)
        generated.append(token)
    return generated, "length"


def small_limits(**changes: object) -> Limits:
    """Limits under which everything happens within a few steps."""
    values: dict = {
        "page_size": 8,
        "max_context": 96,
        "max_queue": 12,
        "buckets": (Bucket(2, 0), Bucket(4, 0), Bucket(2, 1), Bucket(4, 2)),
        "tiles_while_decoding": 1,
    }
    return Limits(**values | changes)


def small_request(name: str, prompt: Iterable[int] = (1, 2, 3), **fields: object) -> Request:
    """A request of 4 tokens, unless told otherwise."""
    return Request(**{"id": name, "prompt": tuple(prompt), "max_tokens": 4, "seed": 0, **fields})


class FakeRank:
    """A rank: a cache of tokens that only `step` reads and only `commit` writes, as in the real programs."""

    def __init__(self, pages: int, page_size: int) -> None:
        self.page_size = page_size
        self.token = np.full(pages * page_size, -1)
        self.position = np.full(pages * page_size, -1)

    def step(self, arrays: Mapping[str, np.ndarray], shapes: Mapping[int, RowShape]) -> tuple[np.ndarray, np.ndarray]:
        """(tokens [Z], log-probabilities [Z]) from the cache and the new rows. 0 for segments of padding."""
        tokens = np.zeros(len(arrays["cached"]), np.int32)
        for segment, row in enumerate(arrays["sample_row"]):
            if arrays["positions"][row] >= 0:
                prefix = self.prefix(arrays, segment, row)
                assert arrays["sample_position"][segment] in (0, len(prefix))
                seed = int(arrays["seed"][segment])
                tokens[segment] = next_token(prefix, seed)
                if segment in shapes:
                    tokens[segment] = shaped_token(fake_logits(prefix, seed), shapes[segment])
        return tokens, np.array([logprob_of(token) for token in tokens], np.float32)

    def prefix(self, arrays: Mapping[str, np.ndarray], segment: int, row: int) -> list[int]:
        """The tokens that `row` attends to, itself the last: those in the cache, then the step's own."""
        cached, base = int(arrays["cached"][segment]), int(arrays["new_base"][segment])
        at = np.arange(cached)
        page = arrays["page_table"][segment][at // self.page_size]
        entries = page * self.page_size + at % self.page_size
        assert (self.position[entries] == at).all(), "the cache holds something else at these entries"
        new = slice(base, row + 1)
        assert (arrays["positions"][new] == cached + np.arange(row + 1 - base)).all()
        return [*self.token[entries].tolist(), *arrays["tokens"][new].tolist()]

    def scores(self, arrays: Mapping[str, np.ndarray], tile: Tile) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of a tile's targets: log-probabilities [32], and of the alternatives the target itself [32, 1] twice."""
        segment = int(np.flatnonzero(arrays["new_base"] <= tile.row)[-1])  # segments are in order of rows
        given = np.zeros(TILE, np.float32)
        for i, target in enumerate(tile.targets):
            if target >= 0:
                given[i] = score_of(self.prefix(arrays, segment, tile.row + i), target)
        return given, tile.targets[:, None], given[:, None]

    def commit(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Write the step's rows into the cache."""
        rows = arrays["write"] != DROPPED
        assert (arrays["positions"][rows] >= 0).all()
        entries = arrays["write"][rows]
        assert len(set(entries.tolist())) == len(entries), "two rows write one entry"
        self.token[entries] = arrays["tokens"][rows]
        self.position[entries] = arrays["positions"][rows]


@dataclasses.dataclass
class FakeServer:
    """The engine on fake ranks. Checks after every event that nothing is owned twice or lost."""

    state: EngineState
    ranks: dict[int, FakeRank] = dataclasses.field(default_factory=dict)
    requests: dict[str, Request] = dataclasses.field(default_factory=dict)
    heard: dict[str, list[Scored | Token | Finished | Exception]] = dataclasses.field(default_factory=dict)
    in_turn: bool = False
    """Prompts that fit in a small bucket are computed one after the other."""
    made: dict[str, int] = dataclasses.field(default_factory=dict)
    """The last token that each request was given by a rank."""

    @classmethod
    def start(cls, limits: Limits, pages: Mapping[int, int]) -> "FakeServer":
        server = cls(EngineState.start(limits, pages))
        server.ranks = {rank: FakeRank(count, limits.page_size) for rank, count in pages.items()}
        return server

    def submit(self, request: Request) -> None:
        self._move(submit(self.state, request))
        self.requests[request.id], self.heard[request.id] = request, []

    def cancel(self, request_id: str) -> None:
        self._move(*cancel(self.state, request_id))

    def expire(self, now: float) -> None:
        self._move(*expire(self.state, now))

    def begin(self) -> Batch | None:
        """Schedule a step."""
        state, batch = schedule(self.state, in_turn=self.in_turn)
        self._move(state)
        return batch

    def end(self, batch: Batch) -> None:
        """Run a scheduled step on all ranks and take its results in."""
        results: dict[str, Result] = {}
        for rank in batch.work:
            results |= self.run(batch, rank)
        self._move(*apply(self.state, batch, results))

    def run(self, batch: Batch, rank: int) -> dict[str, Result]:
        """Run a rank's part of a step, and commit it."""
        arrays = self.arrays(batch, rank)
        self.fill(batch, rank, arrays)
        tokens, logprobs = self.ranks[rank].step(arrays, shapes(batch, rank, allowed_by))
        scores = [self.ranks[rank].scores(arrays, tile) for tile in tiles(batch, rank)]
        results = harvest(batch, rank, tokens, logprobs, (tokens[:, None], logprobs[:, None]), scores)
        self.ranks[rank].commit(arrays)
        self.made |= {request_id: result.token for request_id, result in results.items()}
        return results

    def fill(self, batch: Batch, rank: int, arrays: Mapping[str, np.ndarray]) -> None:
        """Tokens that were unknown when the step was made are those of the step before it."""
        for work, row, _ in segments(batch.bucket, batch.work[rank]):
            if UNKNOWN in work.tokens:
                assert len(work.tokens) == 1
                arrays["tokens"][row] = self.made[work.request_id]

    def step(self) -> Batch | None:
        batch = self.begin()
        if batch is not None:
            self.end(batch)
        return batch

    def drain(self, most: int = 2000) -> None:
        """Steps until no request is open."""
        for _ in range(most):
            if self.step() is None:
                break
        assert not self.state.waiting, f"{list(self.state.waiting)} wait for ever"
        assert not self.state.running, f"{list(self.state.running)} run for ever"

    def arrays(self, batch: Batch, rank: int) -> dict[str, np.ndarray]:
        limits = self.state.limits
        return assemble(batch, rank, page_size=limits.page_size, max_pages=limits.max_pages)

    def lose(self, dead: Collection[int]) -> None:
        for rank in dead:
            self.ranks.pop(rank, None)
        self._move(lose(self.state, dead))

    def adopt(
        self, pages: Mapping[int, int], *, fresh: Collection[int] = (), masked: Collection[tuple[int, int]] = ()
    ) -> None:
        """A new epoch on these ranks; a rank whose cache is not kept forgets it."""
        size = self.state.limits.page_size
        for rank, count in pages.items():
            if rank not in self.ranks or rank in fresh or self.state.pools[rank].total != count:
                self.ranks[rank] = FakeRank(count, size)
        self._move(*adopt(self.state, pages, epoch=self.state.epoch + 1, fresh=fresh, masked=masked))

    def tokens(self, request_id: str) -> list[int]:
        """The tokens the client of a request has."""
        return [item.id for item in self.heard[request_id] if isinstance(item, Token)]

    def check_streams(self, *, all_ended: bool = False) -> None:
        """Every client hears what its request gives alone: each token once, in order, then one end."""
        for request_id, heard in self.heard.items():
            expected, reason = alone(self.requests[request_id], self.state.limits.max_context)
            heard = self.check_scores(request_id)
            tokens = [item for item in heard if isinstance(item, Token)]
            ends = [item for item in heard if not isinstance(item, Token)]
            assert [token.index for token in tokens] == list(range(len(tokens)))
            assert [token.id for token in tokens] == expected[: len(tokens)]
            assert all(token.logprob == logprob_of(token.id) for token in tokens)
            is_open = self.state.find(request_id) is not None
            assert len(ends) == (0 if is_open else 1), f"{request_id} ended {len(ends)} times"
            assert ends == heard[len(tokens) :], f"{request_id} heard something after its end"
            assert not (all_ended and is_open)
            if ends and isinstance(ends[0], Finished) and ends[0].reason in ("stop", "length"):
                assert len(tokens) == len(expected)
                assert ends[0].reason == reason
                assert ends[0].reused < len(self.requests[request_id].prompt)
            elif ends:
                assert isinstance(ends[0], NoCapacity) or ends[0].reason in ("cancelled", "deadline")

    def check_scores(self, request_id: str) -> list[Token | Finished | Exception]:
        """What a client hears after the scores of its prompt, which come first, each once, in order, and all before
        any token."""
        request, heard = self.requests[request_id], list(self.heard[request_id])
        told: list[float] = []
        while heard and isinstance(heard[0], Scored):
            scored = heard.pop(0)
            assert scored.position == len(told) + 1
            told += scored.logprobs
            assert [top[0][1] for top in scored.top if top] == list(scored.logprobs) * (request.prompt_logprobs or 0)
        assert not any(isinstance(item, Scored) for item in heard)
        if request.prompt_logprobs is None:
            assert not told
        else:
            expected = [score_of(request.prompt[:at], request.prompt[at]) for at in range(1, len(request.prompt))]
            assert told == expected[: len(told)]
            done = any(isinstance(item, Token) or getattr(item, "reason", "") in ("stop", "length") for item in heard)
            assert len(told) == len(expected) or not done
        return heard

    def _move(self, state: EngineState, outputs: Iterable[Output] = ()) -> None:
        check_integrity(state)
        self.state = state
        for request_id, item in outputs:
            self.heard[request_id].append(item)
