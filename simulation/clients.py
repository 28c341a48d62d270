"""Simulated clients, and the laws of what they receive: each token once, in order, the expected one; then one end."""

import asyncio
import contextlib
import dataclasses
import math
import random
from collections.abc import AsyncGenerator, Callable

from serving.core.answers import AnswerItem, Chunk, Complete
from serving.core.request_processor import RequestProcessor
from serving.errors import (
    Cancelled,
    DeadlineExceeded,
    Draining,
    Internal,
    MoejaxError,
    NoCapacity,
    PoisonRequest,
    QueueFull,
    UnknownRequest,
)
from serving.protocol.sampling import SamplingParams
from simulation.front import Front
from simulation.hand_model import PREPARED, next_token
from simulation.scenario import Client
from simulation.world import World

LATENCY_S = (0.0001, 0.002)
"""The least and the most virtual seconds from the front to a client."""
RETRY_S = (0.0005, 0.5)
"""The least and the most virtual seconds until a client tries again to reach a front."""
NON_FINITE_S = 3
"""Steps without numbers after which a request may end with an error (`serving.recovery.maintenance.MAX_NON_FINITE`)."""


@dataclasses.dataclass(frozen=True)
class Disconnected:
    """The connection has ended before the answer has."""


@dataclasses.dataclass(frozen=True)
class End:
    """The stream has ended."""


Received = AnswerItem | MoejaxError | Disconnected | End


class Connection:
    """A connection of a client to a front: the front's handler reads a generator, and its items arrive later."""

    def __init__(
        self, front: Front, draw: random.Random, make: Callable[[RequestProcessor], AsyncGenerator[AnswerItem, None]]
    ) -> None:
        self.received: asyncio.Queue[Received] = asyncio.Queue()
        self.reading = asyncio.Event()
        """The client takes items; set at first."""
        self.reading.set()
        self.closed = False
        self._front = front
        self._draw = draw
        self._at = 0.0
        self._loop = asyncio.get_running_loop()
        self._task = front.task(self._handle(make))

    async def _handle(self, make: Callable[[RequestProcessor], AsyncGenerator[AnswerItem, None]]) -> None:
        last: Received = Disconnected()
        try:
            assert self._front.processor is not None
            async with contextlib.aclosing(make(self._front.processor)) as items:
                async for item in items:
                    self._put(item)
                    await self.reading.wait()
            last = End()
        except MoejaxError as error:
            last = error
        finally:
            self._put(last)

    def _put(self, item: Received) -> None:
        if self._front.dead:
            item = Disconnected()
        self._at = max(self._loop.time() + self._draw.uniform(*LATENCY_S), self._at + 1e-6)
        self._loop.call_at(self._at, self.received.put_nowait, item)

    def close(self) -> None:
        """The client disconnects."""
        self.closed = True
        self._task.cancel()


class SimulatedClient:
    """One client from its call to the end of its answers."""

    def __init__(self, world: World, plan: Client) -> None:
        self.world = world
        self.plan = plan
        self.tokens: list[list[int]] = [[] for _ in range(plan.choices)]
        self.ends: list[str] = [""] * plan.choices
        """How each answer ended, as the client first received it."""
        self.outcome = ""
        """How the call ended; "" while it has not."""
        self.accepted = False
        """The client has received a part of an answer."""
        self.aborted = False
        self.left = False
        self.waiting = False
        """It is connected, and has not received the end."""
        self.called_at = 0.0
        self._draw = world.random(f"client/{plan.id}")
        self._connections: list[Connection] = []
        self._readers: list[asyncio.Task[None]] = []

    async def run(self) -> None:
        """Call, and read to the end; after a front has died, from the one after it."""
        await asyncio.sleep(self.plan.at)
        front = await self._reach_front()
        self.called_at = self.world.loop.time()
        self._plan_interruptions()
        await self._read(front, self._submit, may_resume=True)
        for reader in self._readers:
            await reader

    async def _reach_front(self) -> Front:
        while True:
            front = self.world.front
            if isinstance(front, Front) and front.ready.is_set() and not front.dead and not self.world.closing:
                return front
            least, most = map(math.log, RETRY_S)
            await asyncio.sleep(math.exp(self._draw.uniform(least, most)))

    def _plan_interruptions(self) -> None:
        plan, loop = self.plan, self.world.loop
        if plan.leaves is not None:
            loop.call_later(plan.leaves, self._leave)
        if plan.aborts is not None:
            loop.call_later(plan.aborts, self._abort)
        if plan.rereads is not None and self.world.scenario.journal:
            self._readers.append(loop.create_task(self._reread(plan.rereads)))

    def _leave(self) -> None:
        self.left = True
        for connection in self._connections:
            connection.close()
            connection.received.put_nowait(End())

    def _abort(self) -> None:
        front = self.world.front
        if isinstance(front, Front) and front.processor is not None and not front.dead and not self.outcome:
            self.aborted = True
            self.world.note(f"client {self.plan.id} cancels its call")
            front.task(front.processor.abort(self.plan.id))

    async def _reread(self, after: float) -> None:
        await asyncio.sleep(after)
        front = await self._reach_front()
        if self.accepted and not self.left:
            await self._read(front, self._resume, may_resume=False)

    # -- Requests -----------------------------------------------------------------------------------------------

    async def _submit(self, processor: RequestProcessor) -> AsyncGenerator[AnswerItem, None]:
        plan = self.plan
        params = SamplingParams(
            n=plan.choices, seed=plan.seed, max_tokens=plan.max_tokens, stop_tokens=plan.stop_tokens, ignore_eos=True
        )
        requests = await processor.accept_all([plan.prompt], params, request_id=plan.id, timeout_s=plan.timeout_s)
        async with contextlib.aclosing(processor.stream_call(requests)) as items:
            async for item in items:
                yield item

    async def _resume(self, processor: RequestProcessor) -> AsyncGenerator[AnswerItem, None]:
        async with contextlib.aclosing(processor.replay(await processor.find_call(self.plan.id))) as items:
            async for item in items:
                yield item

    async def _read(
        self,
        front: Front,
        make: Callable[[RequestProcessor], AsyncGenerator[AnswerItem, None]],
        *,
        may_resume: bool,
    ) -> None:
        """Read from a front, and from the next one when it dies."""
        while not self.left:
            connection = Connection(front, self._draw, make)
            self._connections.append(connection)
            reading = _Reading(self)
            stalls = self.plan.stalls if make == self._submit else None
            while True:
                self.waiting = True
                item = await connection.received.get()
                self.waiting = False
                if self.left or isinstance(item, (Disconnected, End)):
                    break
                if stalls is not None:
                    connection.reading.clear()
                    self.world.loop.call_later(stalls, connection.reading.set)
                    stalls = None
                if isinstance(item, MoejaxError):
                    self._failed(item, reading)
                    return
                reading.take(item)
            if self.left or isinstance(item, End):
                self._ended(reading)
                return
            if not self.world.scenario.journal:
                self.outcome = self.outcome or "the front died, and there is no journal"
                return
            if not may_resume:
                return
            front, make = await self._reach_front(), self._resume

    # -- Laws ---------------------------------------------------------------------------------------------------

    def violated(self, law: str) -> None:
        """A law was broken for this client."""
        self.world.violated(f"client {self.plan.id}: {law}")

    def _ended(self, reading: "_Reading") -> None:
        if self.left:
            self.outcome = self.outcome or "left"
            return
        open_answers = [choice for choice, end in enumerate(reading.ends) if not end]
        if open_answers:
            self.violated(f"the call ended, and its answers {open_answers} have not")
        self.outcome = self.outcome or "complete"

    def _failed(self, error: MoejaxError, reading: "_Reading") -> None:
        """The call ended with an error: is it one that may be?"""
        name, late = type(error).__name__, False
        began = self.accepted
        if isinstance(error, Cancelled):
            allowed = self.aborted or self.left
        elif isinstance(error, DeadlineExceeded):
            timeout = self.plan.timeout_s
            late = timeout is not None and self.world.loop.time() < self.called_at + timeout
            allowed = timeout is not None and not late
        elif isinstance(error, (QueueFull, NoCapacity)):
            allowed = not began
        elif isinstance(error, Draining):
            allowed = self.world.closing
        elif isinstance(error, UnknownRequest):
            allowed = not began or self.world.disk.refused > 0
        elif isinstance(error, PoisonRequest):
            ended = sum(not rank.alive for rank in self.world.processes)
            allowed = ended + self.world.happened.get("exchange", 0) >= self.world.settings.poison_limit
        elif isinstance(error, Internal):
            made = sum(rank.steps.non_finite.made for rank in self.world.processes)
            allowed = "gives no numbers" in str(error) and made >= NON_FINITE_S
        else:
            allowed = False
        if not allowed:
            self.violated(f"the call ended with {name}: {error}{' before its deadline' if late else ''}")
        if isinstance(error, UnknownRequest) and self.outcome:
            return  # it has ended, and the front that was asked for it again does not know it
        if self.outcome not in ("", "left", name) and self.plan.choices == 1:
            self.violated(f"the call ended twice: with {self.outcome}, then with {name}")
        self.outcome = self.outcome or name


class _Reading:
    """One reading of a call, from its first item on."""

    def __init__(self, client: SimulatedClient) -> None:
        self._client = client
        choices = client.plan.choices
        self._tokens: list[list[int]] = [[] for _ in range(choices)]
        self._epochs = [-1] * choices
        self._weights = [0] * choices
        """The version of the weights that computed the last token."""
        self.ends = [""] * choices

    def take(self, item: AnswerItem) -> None:
        """Take the next item."""
        client = self._client
        if isinstance(item, Chunk):
            client.accepted = True
            for offset, token in enumerate(item.token_ids):
                self._take_token(item.choice, item.index + offset, token, item.epoch, int(item.weights_version))
        elif isinstance(item, Complete):
            self._take_end(item)

    def _take_token(self, choice: int, index: int, token: int, epoch: int, weights: int) -> None:
        """A token is the one that its version of the weights chooses after all tokens before it."""
        client, tokens = self._client, self._tokens[choice]
        first_reading = client.tokens[choice]
        if self.ends[choice]:
            client.violated(f"answer {choice} goes on after its end, with token {index}")
        if index != len(tokens):
            client.violated(f"answer {choice} has token {index} after token {len(tokens) - 1}")
        if self._is_full(choice):
            client.violated(f"answer {choice} goes on after its {len(tokens)} tokens")
        expected = self._next(choice, weights)
        if token != expected or token in client.plan.stop_tokens:
            of = f"epoch {epoch}, weights {weights}"
            client.violated(f"token {index} of answer {choice} is {token}, not {expected} ({of})")
        if index < len(first_reading) and token != first_reading[index]:
            client.violated(f"token {index} of answer {choice} is {token}, and was {first_reading[index]} before")
        if epoch < self._epochs[choice] and len(client.world.pools) == 1:  # each pool counts its own
            client.violated(f"token {index} of answer {choice} is of epoch {epoch}, after {self._epochs[choice]}")
        if weights < self._weights[choice]:
            client.violated(f"token {index} of answer {choice} is of weights {weights}, after {self._weights[choice]}")
        self._epochs[choice], self._weights[choice] = epoch, weights
        tokens.append(token)
        if index == len(first_reading):
            first_reading.append(token)

    def _take_end(self, item: Complete) -> None:
        client, choice = self._client, item.choice
        if self.ends[choice]:
            client.violated(f"answer {choice} ends twice")
        newest = max((rank.hand.weights for rank in client.world.processes), default=0)
        after = {self._next(choice, weights) for weights in range(self._weights[choice], newest + 1)}
        may_stop = after.intersection(client.plan.stop_tokens)
        if item.reason not in (["length"] if self._is_full(choice) else ["stop"] if may_stop else []):
            client.violated(f"answer {choice} ends after {len(self._tokens[choice])} tokens because of {item.reason}")
        self.ends[choice] = item.reason
        client.ends[choice] = client.ends[choice] or item.reason

    def _next(self, choice: int, weights: int) -> int:
        """The token that a version of the weights chooses next."""
        plan = self._client.plan
        return next_token((*plan.prompt, *self._tokens[choice]), plan.seed + choice, weights)

    def _is_full(self, choice: int) -> bool:
        """Whether an answer has as many tokens as it may have."""
        plan, count = self._client.plan, len(self._tokens[choice])
        return count >= plan.max_tokens or len(plan.prompt) + count >= PREPARED.max_context
