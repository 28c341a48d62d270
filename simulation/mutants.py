"""Deliberate breakages of the rules of recovery, and how many seeds the simulator needs to find each.

python -m simulation.mutants [--most 2000] [--only NAME]
"""

import argparse
import asyncio
import dataclasses
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import serving.core.engine_shell
import serving.engine.hand_over
import serving.recovery.adoption
import serving.recovery.kv_restoration
import serving.recovery.take_over
from planner.plan.plan import Plan
from serving.core.hand_over import HandOver
from serving.core.request_log import RequestLog
from serving.engine.page_pool import PagePool
from serving.engine.state import EngineState
from serving.executor.executor import RankExecutor
from serving.executor.failure_detector import NO_DELAY
from serving.executor.host_stream import HostStepWait
from serving.executor.incarnation import Incarnation
from serving.executor.rank_monitor import DelayEvidence
from serving.executor.step_pipeline import StepPipeline
from serving.recovery.adoption import Adoption
from serving.recovery.failover import Failover
from serving.recovery.maintenance import Maintenance
from serving.recovery.membership_events import Seen
from serving.recovery.take_over import TakeOver
from serving.recovery.weight_repair import WeightRepair
from simulation.run import run
from simulation.scenario import draw
from simulation.substitutions import replaced

Change = tuple[Any, str, Any]
"""An attribute that a mutant replaces: its owner, its name, its value."""


@dataclasses.dataclass(frozen=True)
class Mutant:
    """A rule that is broken, and the replacements that break it."""

    name: str
    rule: str
    changes: Callable[[], list[Change]]


def _wrapped(owner: Any, name: str, wrap: Callable[..., Callable[..., Any]]) -> list[Change]:
    """Replace a function by one that is made of it."""
    return [(owner, name, wrap(owner.__dict__[name]))]


def _nothing(owner: Any, name: str) -> list[Change]:
    return [(owner, name, lambda *_, **__: None)]


async def _nothing_async(*_: Any, **__: Any) -> None:
    return None


def _not_killed() -> list[Change]:
    def wrap(declare: Callable[..., None]) -> Callable[..., None]:
        def spares(self: RankExecutor, rank: int, cause: Any, evidence_at: float) -> None:
            process = self._ranks[rank].process
            signal, process.signal = process.signal, lambda name: None
            try:
                declare(self, rank, cause, evidence_at)
            finally:
                process.signal = signal

        return spares

    return _wrapped(RankExecutor, "declare", wrap)


def _epoch_used_twice() -> list[Change]:
    return _wrapped(Plan, "with_epoch", lambda made: lambda self, epoch: made(self, max(epoch - 1, 0)))


def _epochs_restart() -> list[Change]:
    return [(serving.recovery.take_over, "Seen", lambda generation, epoch: Seen(generation, -1))]


def _lost_page() -> list[Change]:
    return _wrapped(PagePool, "release", lambda release: lambda self, pages: release(self, pages[:-1]))


def _resumed_one_short() -> list[Change]:
    def wrap(resubmit: Callable[..., Any]) -> Callable[..., Any]:
        return lambda state, request, *, generated, **rest: resubmit(state, request, generated=generated[:-1], **rest)

    return _wrapped(serving.core.engine_shell, "resubmit", wrap)


def _call_not_journaled() -> list[Change]:
    return [(RequestLog, "record_accepted", lambda self, request_id: self._history.recorded.add(request_id))]


def _stale_epoch_sent() -> list[Change]:
    def wrap(send: Callable[..., None]) -> Callable[..., None]:
        return lambda self, batch, began, *, epoch, **rest: send(self, batch, began, epoch=max(epoch - 1, 0), **rest)

    return _wrapped(StepPipeline, "send", wrap)


def _answers_of_the_dead() -> list[Change]:
    async def call_all(self: RankExecutor, what: str, messages: Mapping[int, Any]) -> list[Any]:
        return await asyncio.gather(*(self.call(rank, what, message) for rank, message in messages.items()))

    return [(RankExecutor, "call_all", call_all)]


def _restored_one_more() -> list[Change]:
    def wrap(mark: Callable[..., Any]) -> Callable[..., Any]:
        return lambda state, request_id, computed: mark(state, request_id, computed + 1)

    return _wrapped(serving.recovery.kv_restoration, "mark_restored", wrap)


def _pages_of_another_rank() -> list[Change]:
    def wrap(take: Callable[..., dict[int, Any]]) -> Callable[..., dict[int, Any]]:
        def rotated(self: TakeOver) -> dict[int, Any]:
            known = take(self)
            ranks = list(known)
            return dict(zip(ranks[1:] + ranks[:1], known.values(), strict=True))

        return rotated

    return _wrapped(TakeOver, "take_known_pages", wrap)


def _answer_of_another_step() -> list[Change]:
    def wrap(take: Callable[..., Any]) -> Callable[..., Any]:
        def first(each: Incarnation, step: int, now: float) -> Any:
            return take(each, next(iter(each.pending_steps), step), now)

        return first

    return _wrapped(Incarnation, "take_pending_step", wrap)


def _host_answers_early() -> list[Change]:
    def end(self: HostStepWait) -> None:
        if self._answers and not self.future.done():
            self.future.set_result(self._answers)

    return [(HostStepWait, "_end", end)]


def _missing_not_masked() -> list[Change]:
    def wrap(adopt: Callable[..., Any]) -> Callable[..., Any]:
        async def believes(self: Adoption, plan: Plan, desired: Plan) -> list[Any]:
            await adopt(self, plan, desired)
            return []

        return believes

    everything = (serving.recovery.adoption, "without_slots", lambda plan, slots: plan)
    return [everything, *_wrapped(Adoption, "_adopt_once", wrap)]


def _sent_and_kept() -> list[Change]:
    def wrap(send: Callable[..., EngineState]) -> Callable[..., EngineState]:
        def kept(state: EngineState, request_id: str) -> EngineState:
            return dataclasses.replace(send(state, request_id), running=state.running)

        return kept

    return _wrapped(serving.engine.hand_over, "send", wrap)


def _replay_forgets_the_last_item() -> list[Change]:
    return _wrapped(RequestLog, "items", lambda items: lambda self, request_id: items(self, request_id)[:-1])


MUTANTS = (
    Mutant("not_killed", "a rank that counts as failed is killed before anything else is done about it", _not_killed),
    Mutant(
        "not_fenced",
        "a plan is adopted only when the lost ranks have ended",
        lambda: [(RankExecutor, "fenced", _nothing_async)],
    ),
    Mutant("epoch_used_twice", "an epoch is used once", _epoch_used_twice),
    Mutant("stale_epoch_sent", "a step is of the epoch of the plan in force", _stale_epoch_sent),
    Mutant(
        "epochs_restart",
        "epochs go on from the last one that ranks of an earlier front have seen",
        _epochs_restart,
    ),
    Mutant(
        "discarded_step_applied",
        "the steps after one that failed are discarded",
        lambda: _nothing(StepPipeline, "discard"),
    ),
    Mutant("lost_page", "pages are conserved", _lost_page),
    Mutant("resumed_one_short", "a request goes on after its last token", _resumed_one_short),
    Mutant("call_not_journaled", "an accepted call is in the journal", _call_not_journaled),
    Mutant("answers_of_the_dead", "an answer of a rank that has died since does not count", _answers_of_the_dead),
    Mutant(
        "caches_cut_in_new_generation",
        "ranks carry the pages in use into a new generation",
        lambda: [(PagePool, "extent", property(lambda self: 0))],
    ),
    Mutant("restored_one_more", "only what was restored counts as restored", _restored_one_more),
    Mutant(
        "pages_of_another_rank", "what is known of a rank's pages is known of no other rank", _pages_of_another_rank
    ),
    Mutant(
        "missing_not_masked",
        "an expert that could not be read is masked",
        _missing_not_masked,
    ),
    Mutant(
        "damage_ignored",
        "damaged weights are loaded again",
        lambda: _nothing(WeightRepair, "record_inspection"),
    ),
    Mutant("losses_swallowed", "who waits for a lost rank gets RankLost", lambda: _nothing(RankExecutor, "_release")),
    Mutant(
        "broken_links_kept",
        "communicators that failed are made again",
        lambda: _nothing(Failover, "mark_comm_broken"),
    ),
    Mutant("answer_of_another_step", "an answer belongs to the step that it names", _answer_of_another_step),
    Mutant("host_answers_early", "a step has ended on a host when all its ranks have answered", _host_answers_early),
    Mutant(
        "moved_without_entries",
        "a request that moves takes its KV entries along",
        lambda: [(Maintenance, "_copy_kv", _nothing_async)],
    ),
    Mutant(
        "starved_taken_for_hung",
        "a rank whose process waits for a processor is given longer",
        lambda: [(DelayEvidence, "since", lambda self, since: NO_DELAY)],
    ),
    Mutant("sent_and_kept", "a request is in one of two pools", _sent_and_kept),
    Mutant(
        "sent_never_released",
        "the prefill pool gives the pages of a request up that is decoded elsewhere",
        lambda: _nothing(HandOver, "_release"),
    ),
    Mutant("replay_forgets", "a replay has all that clients have received", _replay_forgets_the_last_item),
)
"""All mutants. Each is applied with `mutated`."""


def seeds_to_find(mutant: Mutant, most: int) -> tuple[int | None, str]:
    """How many seeds, both modes in turn, until a run breaks a law, and the law; None when none of `most` did."""
    with replaced(mutant.changes()):
        for seed in range(most):
            violations = run(draw(seed, "safety" if seed % 2 == 0 else "liveness")).violations
            if violations:
                return seed + 1, violations[0]
    return None, ""


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a table of all mutants. Returns 1 when one was not found."""
    parser = argparse.ArgumentParser(prog="python -m simulation.mutants", description=__doc__)
    parser.add_argument("--most", type=int, default=2000, help="most seeds for one mutant")
    parser.add_argument("--only", default="", help="the name of one mutant")
    options = parser.parse_args(arguments)
    if os.environ.get("PYTHONHASHSEED") != "0" and arguments is None:
        os.environ["PYTHONHASHSEED"] = "0"
        os.execv(sys.executable, [sys.executable, "-m", "simulation.mutants", *sys.argv[1:]])
    print("| mutant | rule that it breaks | seeds | seconds | law that showed it |\n|---|---|---|---|---|")
    hidden = 0
    for mutant in MUTANTS:
        if options.only in ("", mutant.name):
            began = time.perf_counter()
            seeds, law = seeds_to_find(mutant, options.most)
            hidden += seeds is None
            found = f"more than {options.most}" if seeds is None else str(seeds)
            print(
                f"| {mutant.name} | {mutant.rule} | {found} | {time.perf_counter() - began:.1f} | {law[:100]} |",
                flush=True,
            )
    return 1 if hidden else 0


if __name__ == "__main__":
    sys.exit(main())
