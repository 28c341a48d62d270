"""A server of ranks without processes: the real loop, failover, planner and journal, with clients on it, and what may
happen to it."""

import asyncio
import contextlib
import dataclasses
from collections.abc import Awaitable, Callable

from planner.inputs.cluster import Cluster
from serving.config import Settings
from serving.core.loop import Loop
from serving.core.request_log import RequestLog
from serving.core.step_stats import StepStats
from serving.engine.limits import Limits
from serving.errors import NoCapacity
from serving.launch.weights_record import WeightsRecord
from serving.protocol.events import EventLog
from serving.protocol.instructions import Instruction
from serving.protocol.prepared_model import PreparedModel
from serving.protocol.request import Finished, Request, Token
from serving.protocol.weights import FIRST_WEIGHTS
from serving.recovery.failover import Failover
from serving.text.structured_output import GrammarMatcher
from simulation.byte_tokenizer import byte_tokenizer
from simulation.hand_model import PREPARED, alone, next_token, small_request
from tests.support.fake_executor import FakeExecutor

RANKS = 3
LIMIT_S = 120.0
"""No case takes as long but one that hangs."""
SETTINGS = Settings(
    ranks=RANKS,
    model="fake",
    page_size=8,
    max_context=96,
    pages_per_rank=40,
    lattice_depth=1,
    buckets=((2, 0), (4, 0), (2, 1), (4, 2)),
    scrub_s=0,
)
GRAMMAR = GrammarMatcher(byte_tokenizer(), PREPARED.vocab_size, PREPARED.stop_tokens)


class Machine:
    """A server of fake ranks with requests on it; its front may take over the ranks of an `executor`. With `beside` it
    is the decode pool of a server whose prefill pool is that one."""

    def __init__(
        self,
        settings: Settings,
        executor: FakeExecutor | None = None,
        request_log: RequestLog | None = None,
        model: PreparedModel = PREPARED,
        weights_record: WeightsRecord | None = None,
        beside: "Machine | None" = None,
        sends_entries: bool = False,
    ) -> None:
        limits = Limits.of(settings, model.max_context, states=model.state_bytes > 0)
        self.executor = executor or FakeExecutor(limits.buckets, max_pages=limits.max_pages)
        events, cluster = EventLog(), None
        if beside is not None:
            events, whole = beside.loop.events, Cluster.local(2 * settings.ranks)
            cluster = dataclasses.replace(whole, devices=whole.devices[settings.ranks :])
        step_stats, wake = StepStats(settings, model.info()), asyncio.Event()
        self.failover = Failover(
            settings,
            model,
            self.executor,
            lambda _: None,
            events=events,
            expert_load=lambda: step_stats.expert_load,
            wake=wake.set,
            cluster=cluster,
            kv_replicas=None if beside is None else beside.failover.kv_replicas,
            sends_entries=sends_entries,
            weights=FIRST_WEIGHTS if weights_record is None else weights_record.load(),
            weights_record=weights_record,
        )
        self.executor.on_loss = self.failover.on_rank_lost
        self.executor.on_copied = self.failover.kv_replicas.receive
        self.loop = Loop(
            settings,
            model.info(),
            limits,
            self.executor,
            self.failover,
            GRAMMAR,
            request_log,
            events=events,
            step_stats=step_stats,
            wake=wake,
            output_streams=None if beside is None else beside.loop.engine.output_streams,
        )
        self.requests = [small_request(f"r{i}", range(i, i + 12), max_tokens=24, seed=i) for i in range(6)]
        self.tokens: dict[str, list[int]] = {request.id: [] for request in self.requests}
        self.weights: dict[str, list[int]] = {request.id: [] for request in self.requests}
        """The version of the weights that computed each token."""

    async def read(self, request) -> None:
        """One client: each token once, in order, then one end."""
        async for item in self.loop.stream(request):
            if isinstance(item, Token):
                assert item.index == len(self.tokens[request.id])
                self.tokens[request.id].append(item.id)
                self.weights.setdefault(request.id, []).append(int(item.weights_version))
            else:
                assert item == Finished("length")

    def check_tokens(self, request: Request) -> None:
        """Each token is the one that its version of the weights chooses after those before it, and no version comes
        back."""
        tokens, weights = self.tokens[request.id], self.weights[request.id]
        for index, (token, version) in enumerate(zip(tokens, weights, strict=True)):
            assert token == next_token((*request.prompt, *tokens[:index]), request.sampling.seed, version)
        assert weights == sorted(weights)
        assert len(tokens) == request.sampling.max_tokens
        if not any(weights):
            assert tokens == alone(request, PREPARED.max_context)[0]

    async def begun(self, tokens: int = 8) -> None:
        """Wait until the streams are under way."""
        async with asyncio.timeout(LIMIT_S):
            while min(map(len, self.tokens.values())) < tokens:
                await asyncio.sleep(0)


async def lose_one(m: Machine) -> None:
    m.executor.kill(1)


async def lose_two(m: Machine) -> None:
    m.executor.kill(0)
    m.executor.kill(2)


async def drain_one(m: Machine) -> None:
    await m.loop.apply(Instruction(action="drain", ranks=(1,), replace=True))


async def scale(m: Machine) -> None:
    await m.loop.apply(Instruction(action="scale_down", ranks=(2,)))
    await m.loop.apply(Instruction(action="scale_up", ranks=(2,)))


async def switch_weights(m: Machine) -> None:
    await m.loop.apply(Instruction(action="weights", model="fake"))
    assert m.failover.membership.weights.number == 1


async def finish_weights(m: Machine) -> None:
    await m.loop.apply(Instruction(action="weights", model="fake", running="finish"))
    assert m.failover.membership.weights.number == 1


async def spoil(m: Machine) -> None:
    m.executor.damaged.add((0, 1, 0))
    await m.loop.engine.maintenance.repair.inspect_next(0)


async def coordinator(m: Machine) -> None:
    service = m.failover._rendezvous.coordinator
    assert service is not None
    await service.stop()


async def rebalance(m: Machine) -> None:
    with contextlib.suppress(NoCapacity):  # a rank was lost before
        await m.loop.apply(Instruction(action="rebalance"))


APART = {"arch": "disaggregated", "attention": 2, "experts": 1}
"""Ranks 0 and 1 attend, rank 2 holds all experts: when it is lost rank 1 takes its place."""


async def lose_experts(m: Machine) -> None:
    m.executor.kill(2)


async def lose_attention(m: Machine) -> None:
    m.executor.kill(0)
    m.executor.kill(1)


STATES = dataclasses.replace(PREPARED, state_bytes=8)
"""A model with layers whose context is a state of the request."""


async def play(
    act: Callable[[Machine], Awaitable[None]],
    at: int | None,
    victim: int,
    settings: dict,
    model: PreparedModel = PREPARED,
) -> list:
    """Run a case, with `victim` dying at the message of that number after the first act. The messages since then."""
    m = Machine(Settings(**{**vars(SETTINGS), **settings}), model=model)
    await m.failover.start()
    m.loop.start()
    clients = [asyncio.create_task(m.read(request)) for request in m.requests]
    try:
        await m.begun()
        since = len(m.executor.log)
        if at is not None:
            m.executor.fails = lambda number, rank, what: victim if number == since + at else None
        acting = asyncio.create_task(act(m))
        async with asyncio.timeout(LIMIT_S):
            await asyncio.gather(*clients)
            await acting
            while (
                set(m.failover.plan_ranks) != set(range(RANKS))
                or m.loop.engine.maintenance.pending
                or m.failover.adoption.reconciling
            ):
                await asyncio.sleep(0.001)
        messages = m.executor.log[since:]
        assert m.executor.looked_ahead > 0
        for request in m.requests:
            m.check_tokens(request)
        assert m.failover.plan is not None
        assert m.failover.plan.masked == ()
        assert m.loop.status().failed == 0
        restored, protection = m.loop.engine.restoration.restored, settings["kv_replication"]
        assert restored > 0 or protection == "off" or act not in (lose_one, lose_two, lose_experts) or at is not None
        assert restored == 0 or protection != "off"
        return messages
    finally:
        await m.loop.drain(0.0)
        await m.failover.close()


def at_every_message(
    act: Callable[[Machine], Awaitable[None]], settings: dict, *, every: int = 1, model: PreparedModel = PREPARED
) -> None:
    """The case once undisturbed, then with each rank dying at each of its messages; or at one in `every` of them, so
    that each message and each rank has its turn among the cases."""
    messages = asyncio.run(play(act, None, 0, settings, model))
    assert messages
    for at in range(len(messages)):
        kind = messages[at][1]
        if kind == "step" and at > 2 and messages[at - 1][1] == messages[at - 2][1] == "step":
            continue  # the middle of a run of steps is like its beginning
        for victim in range(RANKS):
            if (RANKS * at + victim + len(messages)) % every:
                continue
            try:
                asyncio.run(play(act, at, victim, settings, model))
            except BaseException as error:
                raise AssertionError(f"rank {victim} died at message {at}, {messages[at]}") from error
