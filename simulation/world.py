"""Everything around a front: ranks and their links, coordination services, the store, the disk; and the laws that
hold for all of them."""

import asyncio
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

from planner.plan.shape import POOLS
from serving.core.start import pool_ranks
from serving.engine.limits import Limits
from serving.executor.incarnation import Loss
from serving.executor.mesh_key import MeshKey
from serving.proto.moejax.v1 import link_pb2
from simulation.disk import Disk
from simulation.exchange import Communicator, Coordinators, Gathering, Member, SimulatedCoordinator
from simulation.hand_model import PREPARED
from simulation.hand_rank import HandRank, HandStore
from simulation.host_agent import RelayingFront, SimulatedHostAgent
from simulation.link import LinkQuality, Peer, Stream
from simulation.rank import SimulatedRank
from simulation.scenario import Scenario

STEP_S = (0.005, 0.02)
"""The least and the most virtual seconds of a step's exchange."""
ENTERING_S = (0.0, 0.05)
"""The least and the most virtual seconds until a rank that enters a generation dies, or its service."""
WALL_S = 1.7e9
"""Seconds since 1970 when a run begins."""
MAX_VIOLATIONS = 20


class FrontProcess(RelayingFront, Peer, Protocol):
    """A front as its world knows it."""


class World:
    """The surroundings of the fronts of one run. `front` is the one that serves now."""

    def __init__(self, scenario: Scenario, folder: Path) -> None:
        self.scenario = scenario
        self.settings = scenario.configuration()
        self.limits = Limits.of(self.settings, PREPARED.max_context, states=scenario.states)
        self.loop = asyncio.get_running_loop()
        self.disk = Disk(folder)
        self.store = HandStore()
        self.coordinators = Coordinators(self.random("coordinators"))
        self.shares_memory = scenario.shares_memory
        self.front: FrontProcess | None = None
        self.faultless = False
        """No more faults happen."""
        self.closing = False
        """The run ends: fronts drain."""
        self.processes: list[SimulatedRank] = []
        """Every process of a rank that was started."""
        self.ranks: dict[int, SimulatedRank] = {}
        """The last process of each rank."""
        rates = scenario.rates
        self.links = {
            rank: LinkQuality(late=rates["late"], late_s=rates["late_s"], doubled=rates["doubled"], lost=rates["lost"])
            for rank in range(self.settings.ranks)
        }
        self.trace: list[str] = []
        self.violations: list[str] = []
        self.happened: dict[str, int] = {}
        """Faults that took effect, by kind."""
        self._pids = 1000
        self._streams: list[Stream] = []
        self._gatherings: dict[object, Gathering] = {}
        self._communicators: dict[object, Communicator] = {}
        self._epochs: dict[tuple[int, str], tuple[object, MeshKey, set[SimulatedRank]]] = {}
        """By epoch and pool: the front that gave it, the mesh, and who adopted it."""
        self._draws = self.random("world")
        self._entering = self.random("entering")
        hosts = dict.fromkeys(self.settings.host_of(rank) for rank in range(self.settings.ranks))
        self.agents = {host: SimulatedHostAgent(self, host) for host in hosts} if scenario.relays else {}
        """The agent of each host whose ranks share a stream."""
        for agent in self.agents.values():
            agent.quality.late, agent.quality.late_s = rates["late"], rates["late_s"]

    def random(self, purpose: str) -> random.Random:
        """A source of randomness that is the same in every run of this scenario."""
        return random.Random(f"{purpose}/{self.scenario.mode}/{self.scenario.seed}")

    def wall(self) -> float:
        """Seconds since 1970."""
        return WALL_S + self.loop.time()

    # -- What the run looks at ----------------------------------------------------------------------------------

    def note(self, text: str) -> None:
        """A line of the trace."""
        self.trace.append(f"{self.loop.time():8.3f} s  {text}")

    def violated(self, law: str) -> None:
        """Something happened that must not."""
        self.note(f"VIOLATED: {law}")
        if len(self.violations) < MAX_VIOLATIONS:
            self.violations.append(law)

    def count(self, kind: str) -> None:
        """A fault took effect."""
        self.happened[kind] = self.happened.get(kind, 0) + 1

    # -- Ranks --------------------------------------------------------------------------------------------------

    def start_rank(self, rank: int, ended: Callable[[SimulatedRank, str], None]) -> SimulatedRank:
        """Start one more process of a rank."""
        before = self.ranks.get(rank)
        if before is not None and before.alive and not before.doomed:
            self.violated(f"rank {rank} is started again while its process {before.pid} runs and was not killed")
        self._pids += 1
        token, agent = f"token {self._pids}", self.agents.get(self.settings.host_of(rank))

        def over(process: SimulatedRank, how: str) -> None:
            if agent is not None:
                agent.forget(token)
            ended(process, how)

        if agent is not None:
            agent.expect(token)
        hand = HandRank(
            rank, self.store, self.limits.buckets, max_pages=self.limits.max_pages, layers=PREPARED.moe_layers
        )
        each = SimulatedRank(
            self,
            hand,
            pid=self._pids,
            token=token,
            stays=self.scenario.stays,
            draw=self.random(f"rank/{rank}/{self._pids}"),
            ended=over,
        )
        self.ranks[rank] = each
        self.processes.append(each)
        self.note(f"rank {rank} starts as process {each.pid}")
        dies = self.scenario.rates["dies_joining"]
        each.joins = before is not None
        if each.joins and not self.faultless and self._draws.random() < dies:
            self.count("dies_joining")
            each.later(self._draws.uniform(0.0, 2.0), lambda: each.die("signal 9"))
        return each

    def dial(self, rank: SimulatedRank) -> Stream | None:
        """See `simulation.rank.RankWorld.dial`."""
        peer = self.agents[self.settings.host_of(rank.rank)].process if self.agents else self.front
        if peer is None or peer.dead or peer.attach_service(rank.rank) is None:
            return None
        stream = Stream(peer, rank, self.links[rank.rank], self.random(f"link/{rank.pid}/{self.loop.time()}"))
        self._streams = [each for each in self._streams if not each.closed]
        self._streams.append(stream)
        return stream

    @property
    def relaying_front(self) -> RelayingFront | None:
        """See `simulation.host_agent.AgentWorld.relaying_front`."""
        return self.front

    def streams_of(self, rank: int) -> list[Stream]:
        """The open streams of a rank."""
        process = self.ranks.get(rank)
        return [stream for stream in self._streams if not stream.closed and stream.is_of(process)]

    def ranks_of_host(self, rank: int) -> list[int]:
        """The ranks of the host that a rank is on."""
        host = self.settings.host_of(rank)
        return [each for each in range(self.settings.ranks) if self.settings.host_of(each) == host]

    @property
    def pools(self) -> Mapping[str, tuple[int, ...]]:
        """The ranks of each pool; where ranks do all kinds of work, they are one without a name."""
        return pool_ranks(self.settings) if self.settings.arch == POOLS else {"": tuple(range(self.settings.ranks))}

    def pool_of(self, rank: int) -> str:
        """The pool of a rank."""
        return next(name for name, ranks in self.pools.items() if rank in ranks)

    def front_died(self, front: FrontProcess) -> None:
        """The process of a front has ended."""
        for service in self.coordinators.services.values():
            service.die()
        self.peer_died(front)
        for agent in self.agents.values():
            agent.front_died(front)
        if not self.scenario.stays:
            for rank in self.ranks.values():
                rank.die("its parent has ended")

    def peer_died(self, peer: object) -> None:
        """A process that served streams of ranks has ended."""
        for stream in self._streams:
            if stream.peer_process is peer:
                stream.peer_died()

    # -- What ranks do together ---------------------------------------------------------------------------------

    def entering(self, rank: SimulatedRank, service: SimulatedCoordinator) -> None:
        """See `simulation.rank.RankWorld.entering`. It, or the service, may die meanwhile, but not at the first start,
        which ends with the loss of a rank."""
        draws, first = self._entering, rank.hand.generation == 0 and not rank.joins
        if self.faultless or first or draws.random() >= self.scenario.rates["dies_joining"] / 2:
            return
        if draws.random() < 0.75:
            self.count("dies_joining")
            rank.later(draws.uniform(*ENTERING_S), lambda: rank.die("signal 9"))
        else:
            self.count("coordinator")
            self.loop.call_later(draws.uniform(*ENTERING_S), service.die)

    def connecting(self, key: object, mesh: MeshKey) -> Gathering:
        """See `simulation.rank.RankWorld.connecting`."""
        if key not in self._gatherings:

            def connected() -> None:
                gathering = self._gatherings[key]
                members: Mapping[int, Member] = dict(gathering.came)
                self._communicators[key] = Communicator(
                    members,
                    lambda: self._draws.uniform(*STEP_S),
                    self.violated,
                    quick_failure=lambda: not self.shares_memory and self._draws.random() < 0.7,
                )
                gathering.end()

            self._gatherings[key] = Gathering(len(mesh.ranks), connected)
        return self._gatherings[key]

    def communicator(self, key: object) -> Communicator:
        """See `simulation.rank.RankWorld.communicator`."""
        return self._communicators[key]

    def communicators_in_use(self) -> list[Communicator]:
        """The communicators whose ranks all live, that of the last step first."""
        found = [each for each in self._communicators.values() if not each.broken]
        living = [each for each in found if all(member.alive for member in each.members.values())]
        return sorted(living, key=lambda each: -each.used_at)

    def check_loss(self, loss: Loss) -> None:
        """A front fences a rank. One whose process has waited for a processor since half of the limit is not fenced for
        its silence before the limit is extended as far as it can be."""
        process, settings = self.ranks.get(loss.rank), self.settings
        if loss.cause.kind != "heartbeat" or process is None or process.stopped or process.starved_since is None:
            return
        waits = process.starved_since <= loss.evidence_at + settings.heartbeat_floor_s / 2
        if waits and loss.judged_at - loss.evidence_at < settings.starved_factor * settings.heartbeat_floor_s:
            self.violated(f"rank {loss.rank} is starved, and fenced as if it did not answer: {loss.cause}")

    def adopted(self, rank: SimulatedRank, message: link_pb2.Adopt, stream: Stream) -> None:
        """A rank has adopted a plan. An epoch is used once, for one plan, by one front; ranks of the plan before that
        it lacks have been fenced, unless they were lost after the plan was sent: one that drains leaves alive."""
        mesh, origin = MeshKey.read(message.mesh), stream.origin
        front, sent_at = origin.front, origin.adopt_sent_at[message.epoch]
        for lost in rank.exchanged_with:
            if lost.rank in mesh.ranks or not lost.alive or lost.doomed_at is None:
                continue
            if lost.doomed_at < sent_at:
                self.violated(f"rank {rank.rank} adopts epoch {message.epoch} before rank {lost.rank} is fenced")
        if rank.joins and not self.faultless and self._draws.random() < self.scenario.rates["dies_joining"]:
            self.count("dies_joining")
            rank.later(self._draws.uniform(0.0, 0.02), lambda: rank.die("signal 9"))
        rank.joins = False
        rank.exchanged_with = [each for each in rank.exchanged_with if each.rank in mesh.ranks]
        epoch = message.epoch, self.pool_of(rank.rank)
        known = self._epochs.get(epoch)
        if known is None or not any(each.alive for each in known[2]):
            self._epochs[epoch] = (front, mesh, {rank})
            return
        if known[:2] != (front, mesh):
            self.violated(f"epoch {message.epoch} is used for two plans; rank {rank.rank} adopts the second one")
        known[2].add(rank)
