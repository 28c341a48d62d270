"""An engine driven event by event on ranks of `simulation.hand_model`, and a check of what its clients receive."""

import dataclasses
from collections.abc import Collection, Iterable, Mapping

import numpy as np

from serving.engine.batch import (
    PLACEHOLDER_TOKEN,
    Batch,
    StepResult,
    collect_results,
    layout,
    prepare_inputs,
)
from serving.engine.integrity import check_integrity
from serving.engine.lifecycle import cancel, expire, submit
from serving.engine.limits import Limits
from serving.engine.logits import logits_adjustments, scored_tiles
from serving.engine.rank_changes import adopt, lose
from serving.engine.scheduler import schedule
from serving.engine.state import EngineState, Output
from serving.engine.step_results import apply
from serving.errors import NoCapacity
from serving.protocol.request import Finished, Request, Scored, Token
from simulation.hand_model import HandCache, allowed_by, alone, logprob_of, score_of, small_limits

CONTEXT = small_limits().max_context
"""Positions of the context under `small_limits`."""


@dataclasses.dataclass
class FakeEngine:
    """An engine on fake ranks. Checks after every event that nothing is owned twice or lost."""

    state: EngineState
    ranks: dict[int, HandCache] = dataclasses.field(default_factory=dict)
    requests: dict[str, Request] = dataclasses.field(default_factory=dict)
    heard: dict[str, list[Scored | Token | Finished | Exception]] = dataclasses.field(default_factory=dict)
    serial_prefill: bool = False
    """Prompts that fit in a small bucket are computed one after the other."""
    made: dict[str, int] = dataclasses.field(default_factory=dict)
    """The last token that each request was given by a rank."""

    @classmethod
    def start(cls, limits: Limits, pages: Mapping[int, int]) -> "FakeEngine":
        server = cls(EngineState.start(limits, pages))
        server.ranks = {rank: HandCache(count, limits.page_size) for rank, count in pages.items()}
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
        state, batch = schedule(self.state, serial_prefill=self.serial_prefill)
        self._move(state)
        return batch

    def end(self, batch: Batch) -> None:
        """Run a scheduled step on all ranks and take its results in."""
        results: dict[str, StepResult] = {}
        for rank in batch.scheduled:
            results |= self.run(batch, rank)
        self._move(*apply(self.state, batch, results))

    def run(self, batch: Batch, rank: int) -> dict[str, StepResult]:
        """Run a rank's part of a step, and commit it."""
        arrays = self.arrays(batch, rank)
        self.fill(batch, rank, arrays)
        tokens, logprobs = self.ranks[rank].step(arrays, logits_adjustments(batch, rank, allowed_by))
        scores = [self.ranks[rank].scores(arrays, tile) for tile in scored_tiles(batch, rank)]
        top = tokens[:, None], logprobs[:, None]
        drafts = 0 if batch.skip_drafts else self.state.limits.model_drafts
        guesses = self.ranks[rank].guesses(arrays, tokens, drafts) if drafts else None
        results = collect_results(batch, rank, tokens, logprobs, top, scores, guesses)
        self.ranks[rank].commit(arrays)
        self.made |= {request_id: result.token for request_id, result in results.items()}
        return results

    def fill(self, batch: Batch, rank: int, arrays: Mapping[str, np.ndarray]) -> None:
        """Tokens that were unknown when the step was made are those of the step before it."""
        for work, row, _ in layout(batch.bucket, batch.scheduled[rank]):
            if PLACEHOLDER_TOKEN in work.tokens:
                assert len(work.tokens) == 1
                assert PLACEHOLDER_TOKEN not in work.drafts
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

    def finish(self) -> None:
        """Run all requests to their ends, and check what their clients received."""
        self.drain()
        self.check_streams(all_ended=True)

    def arrays(self, batch: Batch, rank: int) -> dict[str, np.ndarray]:
        limits = self.state.limits
        return prepare_inputs(batch, rank, page_size=limits.page_size, max_pages=limits.max_pages)

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
                self.ranks[rank] = HandCache(count, size)
        self._move(*adopt(self.state, pages, epoch=self.state.epoch + 1, fresh=fresh, masked=masked))

    def tokens(self, request_id: str) -> list[int]:
        """The tokens the client of a request has."""
        return [item.id for item in self.heard[request_id] if isinstance(item, Token)]

    def check_streams(self, *, all_ended: bool = False) -> None:
        """Every client receives what its request gives alone: each token once, in order, then one end."""
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
                assert ends[0].cached_tokens < len(self.requests[request_id].prompt)
            elif ends:
                assert isinstance(ends[0], NoCapacity) or ends[0].reason in ("cancelled", "deadline")

    def check_scores(self, request_id: str) -> list[Token | Finished | Exception]:
        """The items after the scores of the prompt, which come first, each once, in order, and all before
        any token."""
        request, heard = self.requests[request_id], list(self.heard[request_id])
        told: list[float] = []
        while heard and isinstance(heard[0], Scored):
            scored = heard.pop(0)
            assert scored.position == len(told) + 1
            told += scored.logprobs
            assert [top[0][1] for top in scored.top if top] == list(scored.logprobs) * (
                request.sampling.prompt_logprobs or 0
            )
        assert not any(isinstance(item, Scored) for item in heard)
        if request.sampling.prompt_logprobs is None:
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


def small_engine(pages: Iterable[int] = (16, 16), **limits: object) -> FakeEngine:
    """An engine on ranks 0, 1 ... with so many pages each, under `small_limits`."""
    return FakeEngine.start(small_limits(**limits), dict(enumerate(pages)))
