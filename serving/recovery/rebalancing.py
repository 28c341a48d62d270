"""Moves experts to other ranks when the load asks for it, while steps go on.

The plans for the new placement are computed beside the steps. Then the desired plan is changed between two steps, and
the experts move part by part (`serving.recovery.expert_moves`), each part a plan with an epoch of its own. A loss at
any time is recovered from with the new plans, which have the same meshes.
"""

import asyncio
import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import numpy as np

from planner.plan.plan import Plan
from serving.errors import InvalidRequest, MoejaxError, NoCapacity
from serving.launch.weights_record import write_whole
from serving.protocol.events import EventKind, EventLog
from serving.recovery.failover import Failover
from serving.recovery.plan_catalog import Rebalanced, hottest_share

POLL_S = 0.02
"""Seconds between two looks whether experts have moved."""
LEAST_TOKENS = 64
"""Routed tokens for each expert slot that a measurement must have; with fewer, the hottest rank is chance."""
LEAST_GAIN = 0.02
"""The least by which the hottest rank's share must fall for experts to move."""


class RebalancedServer(Protocol):
    """The parts of the engine's loop that rebalancing uses."""

    events: EventLog
    failover: Failover

    def wake(self) -> None:
        """Make the loop look again at what is due."""
        ...


class Rebalancing:
    """The moves of experts of one server. `routed_load` returns the tokens routed so far, `[moe layers, experts]`;
    `placement` is the file that the next front reads the base plan from."""

    def __init__(
        self, server: RebalancedServer, routed_load: Callable[[], np.ndarray], placement: Path | None = None
    ) -> None:
        self._server = server
        self._routed_load = routed_load
        self._placement = placement
        self._counted = np.zeros(())
        """The load at the end of the last measurement."""
        self._planned: Rebalanced | None = None
        """The placement that is to be adopted between two steps."""
        self._moving: Rebalanced | None = None
        """The placement that experts are moving to."""
        self._busy = False
        self._refused = ""
        """Why the placement did not come into force."""

    @property
    def pending(self) -> bool:
        """True when a placement is to be adopted between two steps."""
        return self._planned is not None

    @property
    def moving(self) -> bool:
        """True while experts move to the placement that was adopted last."""
        return self._moving is not None

    async def run(self) -> None:
        """Balance the load measured since the last call, or since the start if that is too little; returns when experts
        have moved, or need not. Raises InvalidRequest for a model without experts, NoCapacity when not all ranks serve,
        when experts move already, when the balanced placement would survive less or cannot be written for the next
        front, and when ranks are lost or experts cannot be read meanwhile."""
        self._check()
        self._busy, self._refused = True, ""
        try:
            await self._move()
        except MoejaxError as error:
            self._fail(str(error))
            raise
        finally:
            self._busy, self._planned = False, None

    async def _move(self) -> None:
        failover = self._server.failover
        load, self._counted = self._measured(), self._total()
        load = load if load.sum() >= self._least_tokens() else self._counted
        rebalanced = await asyncio.to_thread(failover.plans.rebalanced, load)
        if rebalanced.moved == 0 or rebalanced.before - rebalanced.after < LEAST_GAIN:
            message = f"no expert moves: the hottest rank has {rebalanced.before:.2f} times the mean"
            self._server.events.emit(EventKind.REBALANCED, failover.epoch, message=message)
            return
        try:
            await asyncio.to_thread(self._keep, rebalanced.base)
        except OSError as error:
            raise NoCapacity(f"the placement cannot be written for the next front: {error}") from None
        self._planned = rebalanced
        self._server.wake()
        while self._planned is not None or self._moving is not None:
            await asyncio.sleep(POLL_S)
        if self._refused:
            with contextlib.suppress(OSError):
                await asyncio.to_thread(self._keep, failover.plans.base)
            raise NoCapacity(self._refused)

    def begin(self) -> None:
        """Between two steps: converge to the placement that is planned, unless the ranks are not those it is for."""
        planned, self._planned, plans = self._planned, None, self._server.failover.plans
        if planned is None:
            return
        if not (self._is_in_force(plans.base) and plans.are_those_of(planned)):
            self._refused = "the ranks have changed while the placement was computed; no expert has moved. Try again."
            return
        plans.adopt(planned)
        self._moving = planned
        self._server.failover.adoption.converge_to(planned.base)

    def look(self) -> None:
        """Between two steps: report once the placement is in force, or cannot come into force by moving alone."""
        moving, failover = self._moving, self._server.failover
        if moving is None:
            return
        if self._is_in_force(moving.base):
            self._moving = None
            message = (
                f"the hottest rank has {moving.after:.2f} times the mean, {moving.before:.2f} before; "
                f"{moving.moved} slots have other experts"
            )
            self._server.events.emit(EventKind.REBALANCED, failover.epoch, message=message)
        elif failover.plan is None or failover.plan.rank_ids != moving.base.rank_ids:
            self._give_up("ranks were lost while experts moved; the placement comes into force when they are back.")
        elif not failover.adoption.reconciling:
            self._give_up("some experts cannot be read; the others have moved.")

    def _give_up(self, cause: str) -> None:
        self._moving, self._refused = None, cause
        if not self._busy:  # nobody waits for it any more
            self._fail(cause)

    def _fail(self, cause: str) -> None:
        self._server.events.emit(EventKind.REBALANCE_FAILED, self._server.failover.epoch, cause=cause)

    async def watch(self, bound: float, interval_s: float) -> None:
        """Balance when the hottest rank's share was above `bound` in two measurements in a row, until cancelled."""
        above = 0
        while True:
            await asyncio.sleep(interval_s)
            failover, load = self._server.failover, self._measured()
            if self._busy or self.moving or failover.plan is None or load.sum() < self._least_tokens():
                continue
            above = above + 1 if hottest_share(failover.plan, load) > bound else 0
            if above < 2:
                self._counted = self._total() if above == 0 else self._counted
                continue
            above = 0
            with contextlib.suppress(MoejaxError):  # an event has the cause
                await self.run()

    def _check(self) -> None:
        failover = self._server.failover
        if not failover.plans.base.experts:
            raise InvalidRequest("the model has no experts to move.", param="action")
        if self._busy or self.moving:
            raise NoCapacity("experts are being moved already; wait for the event rebalanced.")
        missing = sorted(set(failover.plans.base.rank_ids).difference(failover.plan_ranks))
        if missing:
            raise NoCapacity(f"experts move only while all ranks serve; {missing} do not. Wait for them.")

    def _is_in_force(self, base: Plan) -> bool:
        plan = self._server.failover.plan
        return plan is not None and plan.rank_ids == base.rank_ids and plan.slots == base.slots

    def _least_tokens(self) -> int:
        return LEAST_TOKENS * self._server.failover.plans.base.slot_table().size

    def _total(self) -> np.ndarray:
        return np.array(self._routed_load(), float)

    def _measured(self) -> np.ndarray:
        return self._total() - self._counted

    def _keep(self, base: Plan) -> None:
        """Write a base plan for the next front. Raises OSError."""
        if self._placement is not None:
            write_whole(self._placement, base.to_json().encode())
