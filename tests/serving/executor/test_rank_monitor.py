"""The monitor of ranks: evidence is read before a late rank is fenced, and only of ranks that may be late."""

from collections.abc import Callable

import pytest

from serving.executor.failure_detector import Cause, FailureDetectorSettings
from serving.executor.incarnation import Incarnation
from serving.executor.rank_monitor import REPORT_S, RankMonitor

pytestmark = pytest.mark.anyio

SETTINGS = FailureDetectorSettings(heartbeat_floor_s=1.0, step_floor_s=2.0)
STEP_S = 0.01


class WatchedProcess:
    """A process whose state and run delay a test sets; it counts how often the delay is read."""

    state = "S"

    def __init__(self, run_delay: Callable[[], float | None]) -> None:
        self.reads = 0
        self._run_delay = run_delay

    def run_delay_s(self) -> float | None:
        self.reads += 1
        return self._run_delay()


class Scene:
    """Two ranks at time 0, of which one is silent from then on while the other answers always; the silent one waits for
    a processor for a share of the time."""

    def __init__(self, *, share: float | None = None) -> None:
        self.now = 0.0
        self.lost: dict[int, tuple[float, Cause]] = {}
        self.failed_steps: list[float] = []
        self.starved: list[tuple[float, int, str]] = []
        self.monitor = RankMonitor(
            SETTINGS,
            declare=lambda rank, cause, evidence_at: self.lost.setdefault(rank, (self.now, cause)),
            fail_step=lambda: self.failed_steps.append(self.now),
            on_starved=lambda rank, evidence: self.starved.append((self.now, rank, evidence)),
        )
        self.ranks = [self._rank(0, lambda: 0.0), self._rank(1, lambda: None if share is None else share * self.now)]

    def _rank(self, number: int, run_delay: Callable[[], float | None]) -> Incarnation:
        each = Incarnation(number)
        each.process = WatchedProcess(run_delay)  # type: ignore[assignment]
        each.last_heartbeat = 0.0
        return each

    @property
    def reads(self) -> list[int]:
        return [each.process.reads for each in self.ranks]  # type: ignore[attr-defined]

    def run(self, until: float, *, silent: bool = True) -> None:
        """Look until a time, or until a rank is lost or a step failed."""
        while self.now < until and not self.lost and not self.failed_steps:
            self.now += STEP_S
            self.ranks[0].last_heartbeat = self.now
            if not silent:
                self.ranks[1].last_heartbeat = self.now
            self.monitor.look(self.ranks, self.now)

    def lost_at(self) -> float:
        (rank, (at, cause)), *_ = self.lost.items()
        assert (rank, cause.kind) == (1, "heartbeat")
        return at


async def test_nothing_is_read_of_ranks_that_answer_in_time() -> None:
    scene = Scene(share=1.0)
    scene.run(30.0, silent=False)
    assert scene.reads == [0, 0]
    scene.run(30.4)
    assert scene.reads == [0, 0]


@pytest.mark.parametrize("share", [None, 0.0])
async def test_a_rank_that_does_not_wait_for_a_processor_is_lost_at_its_limit(share: float | None) -> None:
    scene = Scene(share=share)
    scene.run(9.0)
    assert scene.lost_at() == pytest.approx(1.0, abs=2 * STEP_S)
    assert scene.reads[0] == 0
    assert scene.starved == []


async def test_a_rank_that_always_waits_for_a_processor_is_lost_at_twice_its_limit() -> None:
    scene = Scene(share=1.0)
    scene.run(9.0)
    assert scene.lost_at() == pytest.approx(2.0, abs=2 * STEP_S)


async def test_a_rank_is_given_as_much_longer_as_it_waited_for_a_processor() -> None:
    scene = Scene(share=0.4)
    scene.run(9.0)
    at = scene.lost_at()
    assert at == pytest.approx(1.0 + 0.4 * (at - 0.5), abs=3 * STEP_S)


async def test_evidence_of_one_silence_is_none_of_the_next() -> None:
    scene = Scene(share=1.0)
    scene.run(1.5)
    assert scene.starved
    scene.ranks[1].last_heartbeat = scene.now
    scene.ranks[1].process = WatchedProcess(lambda: 1.5)  # type: ignore[assignment]
    scene.run(9.0)
    assert scene.lost_at() == pytest.approx(2.5, abs=2 * STEP_S)


async def test_a_step_that_a_starved_rank_holds_up_fails_later_by_the_time_it_waited() -> None:
    at: dict[float, float] = {}
    for share in (0.0, 1.0):
        scene = Scene(share=share)
        for each in scene.ranks:
            each.step_sent_at = 0.0
        scene.run(9.0, silent=False)
        (at[share],) = scene.failed_steps
    assert at[0.0] == pytest.approx(2.0, abs=2 * STEP_S)
    assert at[1.0] == pytest.approx(4.0, abs=2 * STEP_S)


async def test_a_starved_rank_is_reported_with_the_evidence_and_at_most_once_a_minute() -> None:
    scene = Scene(share=1.0)
    for _ in range(4):
        scene.run(scene.now + 1.5)
        scene.run(scene.now + 1.0, silent=False)
    ((at, rank, evidence),) = scene.starved
    assert rank == 1
    assert at == pytest.approx(1.0, abs=2 * STEP_S)
    assert "no heartbeat for 1.0" in evidence
    assert "process state S, its process waited 0.5" in evidence
    scene.run(REPORT_S + 2.0, silent=False)
    scene.run(scene.now + 1.5)
    assert len(scene.starved) == 2


async def test_a_late_front_is_evidence_as_a_starved_rank_is() -> None:
    scene = Scene(share=0.0)
    scene.run(0.6)
    scene.monitor._front_late_s += 0.3
    scene.run(9.0)
    assert scene.lost_at() == pytest.approx(1.3, abs=2 * STEP_S)
