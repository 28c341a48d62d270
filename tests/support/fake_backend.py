"""A Backend without a model: its tokens can be worked out by hand, and it fails when told to.

Token i of the answer to prompt p is `(p[-1] + 1 + i) % vocab_size`, unless `reply` gives the answer itself.
Log-probabilities are -0.5, the epoch is the one when the token is made.
"""

import asyncio
import dataclasses
import time
from collections.abc import AsyncGenerator, Sequence

from planner import Cluster, Workload, solve
from planner.deployment import Deployment
from serving.errors import MoejaxError, NoCapacity, NotPermitted, QueueFull, UnknownRequest
from serving.faults import DeviceError, Instruction, Response
from serving.ledger import Call
from serving.request import Finished, Request, Scored, Token
from serving.status import Event, LossCost, ModelInfo, Prospect, RankStatus, Status

MODEL = ModelInfo(
    name="fake",
    vocab_size=300,
    max_context=256,
    stop_tokens=(257,),
    bos_token=None,
    layers=4,
    moe_layers=2,
    experts=8,
    experts_per_token=2,
    parameters=1_000_000,
)


class FakeBackend:
    """Set its attributes at any time; `requests` and `ended` (id -> how) tell what it was asked for."""

    def __init__(
        self,
        *,
        model: ModelInfo = MODEL,
        ranks: int = 4,
        reply: Sequence[int] | None = None,
        delay_s: float = 0.0,
        chaos: bool = True,
        max_queue: int = 10_000,
    ) -> None:
        self.model = model
        self.reply = reply
        self.delay_s = delay_s
        self.chaos = chaos
        self.max_queue = max_queue
        self.fail_at: dict[int, MoejaxError] = {}
        """Errors to raise in place of the token of that index."""
        self.requests: list[Request] = []
        self.ended: dict[str, str] = {}
        self.calls: dict[str, Call] = {}
        self.resumable = False
        self.epoch = 0
        self.reused = 0
        self.dead: set[int] = set()
        self.draining = False
        self.killed: list[tuple[int, str]] = []
        self.applied: list[Instruction] = []
        self.reported: list[DeviceError] = []
        self.operable = False
        self._ranks = ranks
        self._running: dict[str, asyncio.Event] = {}
        self._events: list[Event] = []
        self._news = asyncio.Condition()
        self._tokens = 0
        self._started = time.time()

    def remember(self, call: Call) -> None:
        self.calls[call.id] = call

    def left(self, call_id: str) -> None:
        pass

    def recall(self, call_id: str, owner: str) -> Call:
        call = self.calls.get(call_id)
        if call is None or call.owner != owner:
            raise UnknownRequest(f"there is no request {call_id!r}.")
        return call

    def replay(self, request_id: str) -> AsyncGenerator[Scored | Token | Finished, None]:
        """The fake's answers are known: each is told from its beginning."""
        request = next(r for call in self.calls.values() for r in call.requests if r.id == request_id)
        return self.stream(request)

    async def stream(self, request: Request) -> AsyncGenerator[Scored | Token | Finished, None]:
        self.requests.append(request)
        if len(self.dead) == self._ranks:
            raise NoCapacity(f"0 of {self._ranks} ranks are alive; 1 is needed.", retry_after_s=2.0)
        if len(self._running) >= self.max_queue:
            text = f"{len(self._running)} requests wait; the bound is {self.max_queue}."
            raise QueueFull(text, retry_after_s=1.5)
        aborted = self._running[request.id] = asyncio.Event()
        self.ended[request.id] = "left"
        try:
            async for item in self._play(request, aborted):
                yield item
        except MoejaxError as error:
            self.ended[request.id] = type(error).__name__
            raise
        finally:
            del self._running[request.id]

    async def _play(self, request: Request, aborted: asyncio.Event) -> AsyncGenerator[Scored | Token | Finished, None]:
        if request.prompt_logprobs is not None:
            told = request.prompt[1:]
            top = tuple(((token, -0.25),)[: request.prompt_logprobs] for token in told)
            yield Scored(1, (-0.25,) * len(told), top)
        for index in range(request.max_tokens):
            await asyncio.sleep(self.delay_s)
            if index in self.fail_at:
                raise self.fail_at[index]
            reason = self._interrupted(request, aborted)
            if reason is None and self.reply is not None and index >= len(self.reply):
                reason = "stop"
            if reason is not None:
                self.ended[request.id] = reason
                yield Finished(reason)
                return
            token = self.answer(request, index)
            self._tokens += 1
            yield Token(
                index,
                token,
                -0.5,
                self.epoch,
                top=((token, -0.5), (0, -2.0))[: request.top_logprobs],
                reused=self.reused,
            )
            if token in request.stop_tokens:
                self.ended[request.id] = "stop"
                yield Finished("stop")
                return
        self.ended[request.id] = "length"
        yield Finished("length")

    def answer(self, request: Request, index: int) -> int:
        """Token `index` of the answer."""
        if self.reply is not None:
            return self.reply[index]
        return (request.prompt[-1] + 1 + index) % self.model.vocab_size

    def _interrupted(self, request: Request, aborted: asyncio.Event) -> str | None:
        if aborted.is_set():
            return "cancelled"
        if request.deadline is not None and time.monotonic() > request.deadline:
            return "deadline"
        return None

    def abort(self, request_id: str) -> bool:
        if request_id not in self._running:
            return False
        self._running[request_id].set()
        return True

    @property
    def running(self) -> int:
        """Requests neither ended nor left."""
        return len(self._running)

    def status(self) -> Status:
        return Status(
            epoch=self.epoch,
            generation=0,
            ready=len(self.dead) < self._ranks,
            draining=self.draining,
            chaos=self.chaos,
            operable=self.operable,
            ranks=tuple(self._rank(r) for r in range(self._ranks)),
            axes={"data": self._ranks - len(self.dead)},
            slots_per_rank=3,
            masked=((1, 5),) if self.dead else (),
            lattice={"1 rank": 1.0, "2 ranks": 0.5},
            running=len(self._running),
            waiting=0,
            finished=sum(how in ("stop", "length") for how in self.ended.values()),
            failed=0,
            recoveries=self.epoch,
            tokens=self._tokens,
            steps=self._tokens,
            step_ms=20.0 * self._tokens,
            program_ms=15.0 * self._tokens,
            rank_ms=17.0 * self._tokens,
            rows=40 * self._tokens,
            rows_filled=10 * self._tokens,
            preemptions=3,
            prefix_queries=40,
            prefix_hits=24,
            protection="memory",
            protected_bytes=1 << 20,
            experts_rebuilt=3 * self.epoch,
            parity_groups=7,
            parity_wanted=8,
            parity_bytes=5 << 20,
            tokens_restored=510 * self.epoch,
            tokens_recomputed=2 * self.epoch,
            compiles_after_ready=0,
            started_at=self._started,
            page_size=16,
            experts_loaded=4 * self.epoch,
            expert_load=tuple(
                tuple((layer + 1) * (expert + 1) * self._tokens for expert in range(self.model.experts))
                for layer in range(self.model.moe_layers)
            ),
        )

    def _rank(self, r: int) -> RankStatus:
        if r in self.dead:
            return RankStatus(id=r, pid=None, host="localhost", state="dead")
        experts, rows = self.model.experts, self.model.moe_layers
        slots = tuple(tuple((3 * r + s + layer) % experts for s in range(3)) for layer in range(rows))
        return RankStatus(
            id=r,
            pid=1000 + r,
            host="localhost",
            state="serving",
            slots=slots,
            pages=64,
            pages_used=min(64, 8 * r + 5 * len(self._running)),
            running=len(self._running),
            compiles=2,
            step_ms=12.5,
            loss=LossCost(
                survivable=True,
                prepared=r != 3,
                stall_ms=80.0 + r,
                experts_to_load=r,
                traffic=0.125 * r,
                measured=self.epoch > 0,
            ),
        )

    async def watch(self, after: int = 0) -> AsyncGenerator[Event, None]:
        while True:
            async with self._news:
                while len(self._events) <= after:
                    await self._news.wait()
            for event in self._events[after:]:
                yield event
                after = event.sequence

    async def happen(self, kind: str, **fields) -> None:
        """Report an event."""
        event = Event(sequence=len(self._events) + 1, time=time.time(), kind=kind, epoch=self.epoch, **fields)
        async with self._news:
            self._events.append(event)
            self._news.notify_all()

    async def lose(self, rank: int, cause: str = "SIGKILL") -> None:
        """A rank dies and the others go on under the next epoch."""
        self.dead.add(rank)
        await self.happen("rank_lost", rank=rank, cause=cause)
        self.epoch += 1
        phases = {"detect": 2.0, "fence": 0.5, "abort": 6.0, "plan": 1.0, "adopt": 38.0, "resume": 21.0}
        await self.happen("recovered", rank=rank, cause=cause, phases=phases)

    async def rejoin(self, rank: int) -> None:
        """A rank comes back."""
        self.dead.discard(rank)
        self.epoch += 1
        await self.happen("rejoined", rank=rank)

    def deployment(self) -> Deployment | None:
        alive = [rank for rank in range(self._ranks) if rank not in self.dead]
        if not alive:
            return None
        workload = Workload(moe_layers=2, experts=8, experts_per_token=2, expert_bytes=1000)
        cluster = Cluster.local(self._ranks)
        return Deployment(plan=solve(workload, cluster, alive=alive), workload=workload, cluster=cluster)

    def what_if(self) -> tuple[Prospect, ...]:
        lost = (r for r in range(self._ranks) if r not in self.dead)
        return tuple(
            Prospect(
                kind="rank",
                name=str(rank),
                ranks=(rank,),
                survivable=True,
                reason="",
                prepared=True,
                requests_moved=len(self._running),
                tokens_recomputed=17,
                experts_loaded=3,
                stall_ms=80.5,
                moved_stall_ms=200.25,
                capacity=0.75,
                traffic_lost=0.125,
            )
            for rank in lost
        )

    async def apply(self, instruction: Instruction) -> tuple[int, ...]:
        self.applied.append(instruction)
        serving = [rank for rank in range(self._ranks) if rank not in self.dead]
        gone = instruction.chosen(dict.fromkeys(range(self._ranks), "localhost"), serving) if instruction.ranks else ()
        return tuple(rank for rank in serving if rank not in gone)

    def report(self, error: DeviceError) -> Response:
        self.reported.append(error)
        return error.response

    async def kill(self, rank: int, signal: str = "SIGKILL", host: str = "") -> None:
        if not self.chaos:
            raise NotPermitted("this server was started without --chaos.")
        if not 0 <= rank < self._ranks:
            raise UnknownRequest(f"there is no rank {rank}; ranks are 0 to {self._ranks - 1}.", param="rank")
        self.killed.append((rank, signal))
        await self.lose(rank, signal)


def renamed(name: str) -> ModelInfo:
    """The fake model under another name."""
    return dataclasses.replace(MODEL, name=name)
