"""The state machine of recovery (docs/decisions/0003): a second failure at every message of every stage.

The real loop, failover and planner run on ranks without processes. Each case is first run to learn its messages; then
once for every message and every rank, which dies at that message.
"""

import asyncio
import itertools
from collections.abc import Awaitable, Callable

import pytest

from serving.app import _limits
from serving.config import Settings
from serving.failover import Failover
from serving.faults import Instruction
from serving.guided import Guides
from serving.ledger import Ledger
from serving.loop import Loop
from serving.prepared import Prepared
from serving.request import Finished, Token
from tests.fake_links import FakeLinks
from tests.fake_tokens import byte_tokenizer
from tests.fakes import alone, small_request

pytestmark = pytest.mark.usefixtures("no_processes")

RANKS = 3
LIMIT_S = 20.0
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
MODEL = Prepared(
    name="fake",
    config="{}",
    folder="",
    store="",
    executables="",
    vocab_size=97,
    max_context=96,
    stop_tokens=(),
    bos_token=None,
    layers=2,
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


GUIDES = Guides(byte_tokenizer(), MODEL.vocab_size, MODEL.stop_tokens)


class Machine:
    """A server of fake ranks with requests on it; its front may be one that takes over `links`."""

    def __init__(
        self,
        settings: Settings,
        links: FakeLinks | None = None,
        ledger: Ledger | None = None,
        model: Prepared = MODEL,
    ) -> None:
        losses: list[Callable] = []
        limits = _limits(settings, model.max_context)
        self.links = links or FakeLinks(limits.buckets, max_pages=limits.max_pages)
        self.links.on_loss = lambda loss: [hear(loss) for hear in losses]
        self.failover = Failover(settings, model, self.links, lambda _: None)
        self.loop = Loop(settings, model.info(), limits, self.links, self.failover, GUIDES, ledger)
        losses.append(self.loop.lost)
        self.requests = [small_request(f"r{i}", range(i, i + 12), max_tokens=24, seed=i) for i in range(6)]
        self.tokens: dict[str, list[int]] = {request.id: [] for request in self.requests}

    async def read(self, request) -> None:
        """One client: each token once, in order, then one end."""
        async for item in self.loop.stream(request):
            if isinstance(item, Token):
                assert item.index == len(self.tokens[request.id])
                self.tokens[request.id].append(item.id)
            else:
                assert item == Finished("length")

    async def begun(self, tokens: int = 8) -> None:
        """Wait until the streams are under way."""
        async with asyncio.timeout(LIMIT_S):
            while min(map(len, self.tokens.values())) < tokens:
                await asyncio.sleep(0)


async def lose_one(m: Machine) -> None:
    m.links.kill(1)


async def lose_two(m: Machine) -> None:
    m.links.kill(0)
    m.links.kill(2)


async def drain_one(m: Machine) -> None:
    await m.loop.apply(Instruction(action="drain", ranks=(1,), replace=True))


async def scale(m: Machine) -> None:
    await m.loop.apply(Instruction(action="scale_down", ranks=(2,)))
    await m.loop.apply(Instruction(action="scale_up", ranks=(2,)))


async def spoil(m: Machine) -> None:
    m.links.damaged.add((0, 1, 0))
    await m.loop.operations.inspect_next(0)


async def coordinator(m: Machine) -> None:
    service = m.failover._rendezvous.coordinator
    assert service is not None
    await service.stop()


CASES = (lose_one, lose_two, drain_one, scale, spoil, coordinator)

SHORT = (
    (lose_one, "mask", "memory"),
    (lose_two, "wait", "stream"),
    (drain_one, "wait", "memory"),
    (spoil, "wait", "off"),
)
"""Cases that every run of the tests has; the soak has all."""


APART = {"arch": "disaggregated", "attention": 2, "experts": 1}
"""Ranks 0 and 1 attend, rank 2 holds all experts: when it is lost rank 1 takes its place."""


async def lose_experts(m: Machine) -> None:
    m.links.kill(2)


async def lose_attention(m: Machine) -> None:
    m.links.kill(0)
    m.links.kill(1)


async def play(act: Callable[[Machine], Awaitable[None]], at: int | None, victim: int, settings: dict) -> list:
    """Run a case, with `victim` dying at the message of that number after the first act. The messages since then."""
    m = Machine(Settings(**{**vars(SETTINGS), **settings}))
    await m.failover.start()
    m.loop.start()
    clients = [asyncio.create_task(m.read(request)) for request in m.requests]
    try:
        await m.begun()
        since = len(m.links.log)
        if at is not None:
            m.links.fails = lambda number, rank, what: victim if number == since + at else None
        acting = asyncio.create_task(act(m))
        async with asyncio.timeout(LIMIT_S):
            await asyncio.gather(*clients)
            await acting
            while set(m.failover.alive) != set(range(RANKS)) or m.loop.operations.pending or m.failover.healing:
                await asyncio.sleep(0.001)
        messages = m.links.log[since:]
        assert m.links.looked_ahead > 0
        for request in m.requests:
            assert m.tokens[request.id] == alone(request, MODEL.max_context)[0]
        assert m.failover.plan is not None
        assert m.failover.plan.masked == ()
        assert m.loop.status().failed == 0
        restored, protection = m.loop.restoration.restored, settings["protect_cache"]
        assert restored > 0 or protection == "off" or act not in (lose_one, lose_two, lose_experts) or at is not None
        assert restored == 0 or protection != "off"
        return messages
    finally:
        await m.loop.drain(0.0)
        await m.failover.close()


@pytest.mark.parametrize(
    ("act", "policy", "protection"),
    [
        pytest.param(*case, marks=[] if case in SHORT else [pytest.mark.slow])
        for case in itertools.product(CASES, ("wait", "mask"), ("memory", "stream", "off"))
    ],
)
def test_a_failure_at_any_message_of_any_stage_changes_no_token(act, policy, protection) -> None:
    at_every_message(act, {"on_lost_expert": policy, "protect_cache": protection})


@pytest.mark.parametrize(
    ("act", "policy", "protection"),
    [
        (lose_experts, "wait", "memory"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in itertools.product(
                (lose_experts, lose_attention, lose_one, drain_one, coordinator), ("wait", "mask"), ("memory", "off")
            )
            if case != (lose_experts, "wait", "memory")
        ),
    ],
)
def test_nor_does_one_among_attention_ranks_and_expert_ranks(act, policy, protection) -> None:
    at_every_message(act, {"on_lost_expert": policy, "protect_cache": protection, **APART})


def at_every_message(act: Callable[[Machine], Awaitable[None]], settings: dict) -> None:
    """The case once undisturbed, then with each rank dying at each of its messages."""
    messages = asyncio.run(play(act, None, 0, settings))
    assert messages
    for at in range(len(messages)):
        kind = messages[at][1]
        if kind == "step" and at > 2 and messages[at - 1][1] == messages[at - 2][1] == "step":
            continue  # the middle of a run of steps is like its beginning
        for victim in range(RANKS):
            try:
                asyncio.run(play(act, at, victim, settings))
            except BaseException as error:
                raise AssertionError(f"rank {victim} died at message {at}, {messages[at]}") from error
