"""Canaries of an upgrade: each new front, and each rank that joins with other code, computes requests whose tokens are
known before it computes anything for a client (docs/decisions/0026).
"""

import asyncio
import dataclasses
from collections.abc import Callable, Iterable
from typing import Protocol

from serving.engine.canaries import end_canaries, submit_canaries
from serving.engine.state import EngineState, Output
from serving.errors import MoejaxError
from serving.protocol.request import Finished, Request, Token
from serving.protocol.sampling import ResolvedSampling
from serving.recovery.failover import Failover

PROMPT_TOKENS, TOKENS = 48, 8
"""Tokens of a canary's prompt and of its answer: a tile and a half, then steps of one row."""
TEMPERATURES = (0.0, 1.0)
"""Each rank computes one greedy canary and one that draws, with a seed: the tokens of both are known."""

Answers = tuple[tuple[int, ...], ...]
"""The tokens of a rank's canaries, in the order of TEMPERATURES."""


class TriedServer(Protocol):
    """The parts of the engine's loop that canaries use."""

    state: EngineState
    failover: Failover

    def wake(self) -> None:
        """Make the loop look again at what is due."""
        ...


@dataclasses.dataclass
class Trial:
    """Canaries that run for `joiners`, or for the front when there are none: tokens and errors by request."""

    joiners: frozenset[int]
    verdict: "asyncio.Future[str]"
    requested: bool = True
    """Whether the canaries are still to be submitted."""
    ranks: tuple[int, ...] = ()
    tokens: dict[str, list[int]] = dataclasses.field(default_factory=dict)
    errors: dict[str, str] = dataclasses.field(default_factory=dict)
    missing: set[str] = dataclasses.field(default_factory=set)


class Canary:
    """The canaries of one server. `expected` are the answers that count as right; while it is None, those of a trial
    need only be the same on all ranks. `on_failed` gets the ranks that joined, and why they cannot be trusted; it is
    called before any other request is in a step."""

    def __init__(self, server: TriedServer) -> None:
        self.expected: Answers | None = None
        self.tries_joiners = False
        """Whether ranks that join are tried."""
        self.on_failed: Callable[[frozenset[int], str], None] = lambda ranks, cause: None
        self._server = server
        self._trial: Trial | None = None

    @property
    def busy(self) -> bool:
        """Whether canaries run, or are about to."""
        return self._trial is not None

    def begin(self, joiners: Iterable[int] = ()) -> "asyncio.Future[str]":
        """Run canaries on every attention rank before any other request is in a step; no step may be in flight. The
        future gets why the answers are wrong: empty when they are right."""
        verdict = self.request(joiners)
        self.submit_requested()
        return verdict

    def request(self, joiners: Iterable[int] = ()) -> "asyncio.Future[str]":
        """As `begin`, from the next pause between steps on."""
        if self._trial is None:
            self._trial = Trial(frozenset(joiners), asyncio.get_running_loop().create_future())
        else:
            self._trial.joiners |= frozenset(joiners)
        self._trial.requested = True
        self._server.wake()
        return self._trial.verdict

    def submit_requested(self) -> None:
        """Between two steps: begin with what was requested, once there is a rank for it."""
        if self._trial is not None and self._trial.requested and self._server.state.pools:
            self._submit(self._trial)

    def on_joined(self, joiners: Iterable[int]) -> None:
        """Ranks have joined and are in the plan in force."""
        if self.tries_joiners:
            self.begin(joiners)

    def on_plan(self) -> None:
        """A plan has come into force: the canaries that run begin again on its ranks. Ranks that joined and are lost
        have failed."""
        if (trial := self._trial) is None:
            return
        gone = trial.joiners.difference(self._server.failover.plan_ranks)
        if gone:
            self._end(trial, f"ranks {', '.join(map(str, sorted(gone)))} were lost while they computed the canaries")
        elif set(trial.ranks) != set(self._server.state.pools):
            trial.requested = True
            self.submit_requested()

    def take(self, outputs: Iterable[Output]) -> list[Output]:
        """Take what was computed for canaries. Returns the outputs of all other requests."""
        trial, rest = self._trial, []
        for request_id, item in outputs:
            if trial is None or request_id not in trial.tokens:
                rest.append((request_id, item))
            elif isinstance(item, Token):
                trial.tokens[request_id].append(item.id)
            elif isinstance(item, (Finished, MoejaxError)):
                trial.missing.discard(request_id)
                if isinstance(item, MoejaxError):
                    trial.errors[request_id] = str(item)
        if trial is not None and trial.tokens and not trial.missing:
            known, cause, failover = self.expected, self._judge(trial), self._server.failover
            masked = failover.plan is not None and bool(failover.plan.masked)
            if masked and (cause or known is None):
                self.expected = known
                cause = f"{cause or 'canaries are not compared'}, while experts are masked"
            if masked and cause and failover.adoption.reconciling:
                trial.requested = True  # once more, until the experts are there that are being loaded
                self._server.wake()
            else:
                self._end(trial, cause)
        return rest

    def _submit(self, trial: Trial) -> None:
        state, vocab = self._server.state, self._server.failover.model.vocab_size
        trial.ranks = tuple(sorted(state.pools))
        made = [(_canary(rank, temperature, vocab), rank) for rank in trial.ranks for temperature in TEMPERATURES]
        trial.tokens = {request.id: [] for request, _ in made}
        trial.errors, trial.missing, trial.requested = {}, set(trial.tokens), False
        self._server.state = submit_canaries(state, made)
        self._server.wake()

    def _judge(self, trial: Trial) -> str:
        if trial.errors:
            return f"a canary ended with an error: {next(iter(trial.errors.values()))}"
        by_rank = {rank: tuple(tuple(trial.tokens[_name(rank, each)]) for each in TEMPERATURES) for rank in trial.ranks}
        self.expected = self.expected or by_rank[trial.ranks[0]]
        for rank, answers in by_rank.items():
            if answers != self.expected:
                return f"on rank {rank} the canaries have tokens {list(answers)}, and had {list(self.expected)}"
        return ""

    def _end(self, trial: Trial, cause: str) -> None:
        self._trial = None
        self._server.state = end_canaries(self._server.state)
        if cause:
            self.on_failed(trial.joiners, cause)
        if not trial.verdict.done():
            trial.verdict.set_result(cause)


def _name(rank: int, temperature: float) -> str:
    return f"canary-{rank}-{temperature:g}"


def _canary(rank: int, temperature: float, vocab: int) -> Request:
    prompt = tuple((7 + 13 * place) % vocab for place in range(PROMPT_TOKENS))
    sampling = ResolvedSampling(temperature=temperature, max_tokens=TOKENS, seed=1)
    return Request(id=_name(rank, temperature), prompt=prompt, sampling=sampling)
