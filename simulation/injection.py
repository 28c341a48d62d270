"""Carries out the faults of a scenario, and what operators do, each at its time."""

import asyncio
import math
from collections.abc import Callable

import numpy as np

from serving.core.loop import Loop
from serving.core.pools import Pools
from serving.errors import MoejaxError
from serving.protocol.instructions import DeviceError, Instruction
from simulation.front import Front
from simulation.host_agent import SimulatedHostAgent
from simulation.link import GIVE_UP_S
from simulation.rank import SimulatedRank
from simulation.scenario import Fault
from simulation.world import World

MOST_TURNS = 60
"""Most turns of the event loop by which a front's death is delayed, so that it falls between any two turns."""
ANY_MESH = 0.3
"""Share of the failed exchanges that are of any mesh that is connected, and not of that of the last step."""
DRAIN_S = 5.0
"""Most seconds for which an operator has the requests of a leaving rank wait for room."""


class Injection:
    """The faults of one run. What it begins it also ends: `heal` ends all that is still going on."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.operators: list[asyncio.Task[None]] = []
        """The instructions of operators, until they return."""
        self._store_until = self._disk_until = 0.0

    async def run(self) -> None:
        """Carry out all faults of the scenario."""
        acts = self._acts()
        for fault in self.world.scenario.faults:
            await asyncio.sleep(max(0.0, fault.at - self.world.loop.time()))
            self.world.note(f"fault {fault.kind}: rank {fault.rank}, {fault.seconds:.3f} s, value {fault.value:.3f}")
            if acts[fault.kind](fault):
                self.world.count(fault.kind)

    def _acts(self) -> dict[str, Callable[[Fault], bool]]:
        """The methods that begin a fault, by kind; each returns whether there was something to break."""
        return {
            "crash": self._crash,
            "host_crash": self._host_crash,
            "hang": self._hang,
            "stuck": self._stuck,
            "slow": self._slow,
            "starved": self._starved,
            "nan": self._nan,
            "corrupt_nan": self._corrupt_nan,
            "corrupt_flip": self._corrupt_flip,
            "partition": self._partition,
            "host_partition": self._host_partition,
            "cut": self._cut,
            "exchange": self._exchange,
            "store": self._store,
            "disk": self._disk,
            "front": self._front,
            "coordinator": self._coordinator,
            "drain": self._drain,
            "scale_down": self._scale_down,
            "scale_up": self._scale_up,
            "rebalance": self._rebalance,
            "weights": self._weights,
            "pause": self._pause,
            "device_error": self._device_error,
            "relay": self._host_crash,
            "relay_cut": self._relay_cut,
        }

    def heal(self) -> None:
        """All faults end. A rank that is stopped stays so: it counts as dead."""
        world = self.world
        world.faultless = True
        world.store.readable, world.disk.full = True, False
        for link in (*world.links.values(), *(agent.quality for agent in world.agents.values())):
            link.late = link.doubled = link.lost = link.blocked_until = 0.0
        for rank in world.ranks.values():
            rank.slowness, rank.steps.non_finite.steps = 1.0, 0
            rank.feed()

    # -- Ranks --------------------------------------------------------------------------------------------------

    def _process(self, rank: int) -> SimulatedRank | None:
        process = self.world.ranks.get(rank)
        return process if process is not None and process.alive else None

    def _crash(self, fault: Fault) -> bool:
        process = self._process(fault.rank)
        if process is not None:
            process.die("signal 9")
        return process is not None

    def _host_crash(self, fault: Fault) -> bool:
        found = [self._process(rank) for rank in self.world.ranks_of_host(fault.rank)]
        if (agent := self._agent(fault.rank)) is not None:
            self.operators.append(self.world.loop.create_task(agent.die()))
        for process in found:
            if process is not None:
                process.die("signal 9")
        return any(found)

    def _agent(self, rank: int) -> SimulatedHostAgent | None:
        """The host agent that passes on the stream of a rank, if one does."""
        return self.world.agents.get(self.world.settings.host_of(rank))

    def _hang(self, fault: Fault) -> bool:
        process = self._process(fault.rank)
        if process is None:
            return False
        process.signal("SIGSTOP")
        if fault.value < 0.5:
            self.world.loop.call_later(fault.seconds, process.signal, "SIGCONT")
        return True

    def _stuck(self, fault: Fault) -> bool:
        process = self._process(fault.rank)
        if process is None:
            return False
        process.stick()
        if fault.value < 0.5:
            self.world.loop.call_later(fault.seconds, process.unstick)
        return True

    def _slow(self, fault: Fault) -> bool:
        process = self._process(fault.rank)
        if process is None:
            return False
        process.slowness = 2.0 + 8.0 * fault.value
        self.world.loop.call_later(fault.seconds, setattr, process, "slowness", 1.0)
        return True

    def _starved(self, fault: Fault) -> bool:
        process = self._process(fault.rank)
        if process is not None:
            process.starve(fault.seconds)
        return process is not None

    def _nan(self, fault: Fault) -> bool:
        process = self._process(fault.rank)
        if process is not None:
            process.steps.non_finite.steps += 1 + int(3 * fault.value)
        return process is not None

    def _corrupt_nan(self, fault: Fault) -> bool:
        return self._corrupt(fault, "nan")

    def _corrupt_flip(self, fault: Fault) -> bool:
        return self._corrupt(fault, "flip")

    def _corrupt(self, fault: Fault, damage: str) -> bool:
        process = self._process(fault.rank)
        held = process.hand.held if process is not None else None
        filled = np.argwhere(held >= 0).tolist() if held is not None else []
        if process is None or not filled:
            return False
        layer, slot = filled[int(fault.value * len(filled))]
        process.hand.damaged[layer, slot] = damage
        return True

    # -- Links --------------------------------------------------------------------------------------------------

    def _partition(self, fault: Fault) -> bool:
        return self._block([fault.rank], fault.seconds)

    def _host_partition(self, fault: Fault) -> bool:
        agent, world = self._agent(fault.rank), self.world
        if agent is None:
            return self._block(world.ranks_of_host(fault.rank), fault.seconds)
        agent.quality.blocked_until = max(agent.quality.blocked_until, world.loop.time() + fault.seconds)
        if fault.seconds > GIVE_UP_S:
            world.loop.call_later(GIVE_UP_S, agent.cut)
        return True

    def _relay_cut(self, fault: Fault) -> bool:
        agent = self._agent(fault.rank)
        return agent is not None and agent.cut()

    def _block(self, ranks: list[int], seconds: float) -> bool:
        world = self.world
        for rank in ranks:
            world.links[rank].blocked_until = max(world.links[rank].blocked_until, world.loop.time() + seconds)
            if seconds > GIVE_UP_S:
                for stream in world.streams_of(rank):
                    world.loop.call_later(GIVE_UP_S, stream.cut)
        return True

    def _cut(self, fault: Fault) -> bool:
        streams = self.world.streams_of(fault.rank)
        for stream in streams:
            stream.cut()
        return bool(streams)

    def _exchange(self, fault: Fault) -> bool:
        found = self.world.communicators_in_use()
        if found:
            at = int(fault.value / ANY_MESH * len(found)) if fault.value < ANY_MESH else 0
            found[at].break_off("connection reset by peer")
        return bool(found)

    # -- Store, disk, front -------------------------------------------------------------------------------------

    def _store(self, fault: Fault) -> bool:
        world = self.world
        self._store_until = max(self._store_until, world.loop.time() + fault.seconds)
        world.store.readable = False

        def back() -> None:
            world.store.readable = world.store.readable or world.loop.time() >= self._store_until

        world.loop.call_later(fault.seconds, back)
        return True

    def _disk(self, fault: Fault) -> bool:
        world = self.world
        self._disk_until = max(self._disk_until, world.loop.time() + fault.seconds)
        world.disk.full = True

        def back() -> None:
            world.disk.full = world.disk.full and world.loop.time() < self._disk_until

        world.loop.call_later(fault.seconds, back)
        return True

    def _front(self, fault: Fault) -> bool:
        front = self.world.front
        if not isinstance(front, Front) or front.dead:
            return False

        async def kill() -> None:
            for _ in range(math.floor(MOST_TURNS * fault.value)):
                await asyncio.sleep(0)
            await front.kill()

        self.operators.append(self.world.loop.create_task(kill()))
        return True

    def _coordinator(self, fault: Fault) -> bool:
        service = self.world.coordinators.last
        if service is not None:
            service.die()
        return service is not None

    # -- Operators ----------------------------------------------------------------------------------------------

    def _serving(self) -> tuple[Front, Loop | Pools] | None:
        """The front that serves, and its loop or loops."""
        front = self.world.front
        if not isinstance(front, Front) or not front.ready.is_set() or front.dead or front.backend is None:
            return None
        return front, front.backend

    def instruct(self, instruction: Instruction) -> bool:
        """An operator gives an instruction to the front that serves."""
        serving, world = self._serving(), self.world
        if serving is None:
            return False
        front, loop = serving

        async def apply() -> None:
            try:
                await loop.apply(instruction)
                world.note(f"operator: {instruction.action} of {instruction.ranks} is done")
            except MoejaxError as error:
                world.note(f"operator: {instruction.action} of {instruction.ranks} is refused: {error}")

        self.operators.append(front.task(apply()))
        return True

    def call_up(self) -> bool:
        """An operator asks for all ranks, pool by pool where there are several."""
        pools = self.world.pools
        wanted = [Instruction(action="scale_up", ranks=ranks if len(pools) > 1 else ()) for ranks in pools.values()]
        return sum(self.instruct(each) for each in wanted) == len(wanted)  # each of them, not the first alone

    def _drain(self, fault: Fault) -> bool:
        timeout_s = DRAIN_S * fault.value
        return self.instruct(
            Instruction(action="drain", ranks=(fault.rank,), replace=fault.value < 0.8, timeout_s=timeout_s)
        )

    def _scale_down(self, fault: Fault) -> bool:
        return self.instruct(Instruction(action="scale_down", ranks=(fault.rank,), timeout_s=DRAIN_S * fault.value))

    def _scale_up(self, fault: Fault) -> bool:
        return self.call_up()

    def _rebalance(self, fault: Fault) -> bool:
        return self.instruct(Instruction(action="rebalance"))

    def _weights(self, fault: Fault) -> bool:
        running = "finish" if fault.value < 0.5 else "switch"
        timeout_s = 2 * DRAIN_S * fault.value
        return self.instruct(Instruction(action="weights", model="fake", running=running, timeout_s=timeout_s))

    def _pause(self, fault: Fault) -> bool:
        self.world.loop.call_later(fault.seconds, self.instruct, Instruction(action="retry"))
        return self.instruct(Instruction(action="pause"))

    def _device_error(self, fault: Fault) -> bool:
        serving = self._serving()
        if serving is None:
            return False
        front, loop = serving
        front.context.run(loop.report, DeviceError(rank=fault.rank, level=1 + int(6 * fault.value)))
        return True
