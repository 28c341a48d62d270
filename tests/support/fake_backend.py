"""A `Backend` without a model. Its tokens can be computed by hand, and it fails where a test wants it to.

Token i of the answer to prompt p is `(p[-1] + 1 + i) % vocab_size`, unless `reply` gives the answer itself.
Log-probabilities are -0.5, the epoch is the one when the token is made.
"""

import asyncio
import dataclasses
import json
import time
from collections.abc import AsyncGenerator, Collection, Sequence
from pathlib import Path

from planner import Cluster, Workload, solve
from planner.plan.deployment import Deployment
from serving.errors import MoejaxError, NoCapacity, NotPermitted, QueueFull, UnknownRequest
from serving.protocol.events import Event
from serving.protocol.instructions import DeviceError, ErrorResponse, Instruction
from serving.protocol.prepared_model import ModelInfo
from serving.protocol.request import Call, Finished, Request, Scored, Token
from serving.protocol.status import LossCost, LossForecast, RankStatus, Status
from serving.protocol.tensors import DATA, TENSORS, TensorTarget, TensorUpdate

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
    """A test may set its attributes at any time. `requests` and `ended` (id -> how) record the requests it got."""

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
        self.may_answer = asyncio.Event()
        """Cleared by a test that holds all requests before their next token."""
        self.may_answer.set()
        self.fail_at: dict[int, MoejaxError] = {}
        """Errors to raise instead of the token with that index."""
        self.requests: list[Request] = []
        self.ended: dict[str, str] = {}
        self.calls: dict[str, Call] = {}
        self.sent: dict[str, list[Scored | Token | Finished | MoejaxError]] = {}
        """The items that requests got, by id."""
        self.resumable = False
        self.first_steps: dict[str, float] = {}
        """When requests left the queue, by id."""
        self.epoch = 0
        self.cached_tokens = 0
        self.dead: set[int] = set()
        self.draining = False
        self.killed: list[tuple[int, str]] = []
        self.applied: list[Instruction] = []
        self.reported: list[DeviceError] = []
        self.tensors: TensorTarget | None = None
        """The tensors that can be changed."""
        self.updates: list[TensorUpdate] = []
        self.changed: dict[str, bytes] = {}
        """The bytes of changed tensors."""
        self.operable = False
        self._ranks = ranks
        self._running: dict[str, asyncio.Event] = {}
        self._events: list[Event] = []
        self._news = asyncio.Condition()
        self._tokens = 0
        self._made: dict[str, int] = {}
        self._started = time.time()

    def register_call(self, call: Call) -> None:
        self.calls[call.id] = call

    @property
    def recovering(self) -> bool:
        return False

    def has_begun(self, request_id: str) -> bool:
        return request_id in self.sent

    def close_call(self, call_id: str) -> None:
        pass

    def fail_requests(self, request_ids: Collection[str], error: MoejaxError) -> None:
        pass

    def find_call(self, call_id: str, owner: str) -> Call:
        call = self.calls.get(call_id)
        if call is None or call.owner != owner:
            raise UnknownRequest(f"there is no request {call_id!r}.")
        return call

    def forget_call(self, call_id: str) -> None:
        self.calls.pop(call_id, None)

    def replay(self, request_id: str, *, follow: bool = True) -> AsyncGenerator[Scored | Token | Finished, None]:
        """The tokens of a request from its beginning. Those of one that has ended are computed again, because they are
        always the same, if not only those sent are wanted."""
        request = next(r for call in self.calls.values() for r in call.requests if r.id == request_id)
        return self._sent(request_id, follow) if not follow or request_id in self._running else self.stream(request)

    async def _sent(self, request_id: str, follow: bool) -> AsyncGenerator[Scored | Token | Finished, None]:
        position = 0
        while position < len(self.sent[request_id]) or (follow and request_id in self._running):
            if position == len(self.sent[request_id]):
                await asyncio.sleep(0.001)
                continue
            item = self.sent[request_id][position]
            if isinstance(item, MoejaxError):
                raise item
            yield item
            position += 1

    async def stream(self, request: Request) -> AsyncGenerator[Scored | Token | Finished, None]:
        self.requests.append(request)
        sent = self.sent[request.id] = []
        if len(self.dead) == self._ranks:
            raise NoCapacity(f"0 of {self._ranks} ranks are alive; 1 is needed.", retry_after_s=2.0)
        if len(self._running) >= self.max_queue:
            text = f"{len(self._running)} requests wait; the bound is {self.max_queue}."
            raise QueueFull(text, retry_after_s=1.5)
        aborted = self._running[request.id] = asyncio.Event()
        self.ended[request.id] = "left"
        try:
            async for item in self._play(request, aborted):
                sent.append(item)
                yield item
        except MoejaxError as error:
            sent.append(error)
            self.ended[request.id] = type(error).__name__
            raise
        finally:
            del self._running[request.id]

    async def _play(self, request: Request, aborted: asyncio.Event) -> AsyncGenerator[Scored | Token | Finished, None]:
        if request.sampling.prompt_logprobs is not None:
            scored = request.prompt[1:]
            top = tuple(((token, -0.25),)[: request.sampling.prompt_logprobs] for token in scored)
            yield Scored(1, (-0.25,) * len(scored), top)
        for index in range(request.sampling.max_tokens):
            await asyncio.sleep(self.delay_s)
            await self.may_answer.wait()
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
            self._made[request.id] = index + 1
            yield Token(
                index,
                token,
                -0.5,
                self.epoch,
                top=((token, -0.5), (0, -2.0))[: request.sampling.top_logprobs],
                cached_tokens=self.cached_tokens,
            )
            if token in request.sampling.stop_tokens:
                self.ended[request.id] = "stop"
                yield Finished("stop")
                return
        self.ended[request.id] = "length"
        yield Finished("length")

    def answer(self, request: Request, index: int) -> int:
        """The token with this index."""
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

    def first_step_at(self, request_id: str) -> float | None:
        return self.first_steps.get(request_id)

    def made(self, request_id: str) -> int:
        """The number of tokens that a request has been given."""
        return self._made.get(request_id, 0)

    @property
    def running(self) -> int:
        """The number of requests that have not ended."""
        return len(self._running)

    def status(self) -> Status:
        return Status(
            epoch=self.epoch,
            generation=0,
            ready=len(self.dead) < self._ranks,
            draining=self.draining,
            chaos=self.chaos,
            operable=self.operable,
            certificate="holds",
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

    async def emit(self, kind: str, **fields) -> None:
        """Emit an event."""
        event = Event(sequence=len(self._events) + 1, time=time.time(), kind=kind, epoch=self.epoch, **fields)
        async with self._news:
            self._events.append(event)
            self._news.notify_all()

    async def lose(self, rank: int, cause: str = "SIGKILL") -> None:
        """Let a rank die; the others continue in the next epoch."""
        self.dead.add(rank)
        await self.emit("rank_lost", rank=rank, cause=cause)
        self.epoch += 1
        phases = {"detect": 2.0, "fence": 0.5, "abort": 6.0, "plan": 1.0, "adopt": 38.0, "resume": 21.0}
        await self.emit("recovered", rank=rank, cause=cause, phases=phases)

    async def rejoin(self, rank: int) -> None:
        """Let a rank rejoin."""
        self.dead.discard(rank)
        self.epoch += 1
        await self.emit("rejoined", rank=rank)

    def deployment(self) -> Deployment | None:
        alive = [rank for rank in range(self._ranks) if rank not in self.dead]
        if not alive:
            return None
        workload = Workload(moe_layers=2, experts=8, experts_per_token=2, expert_bytes=1000)
        cluster = Cluster.local(self._ranks)
        return Deployment(plan=solve(workload, cluster, alive=alive), workload=workload, cluster=cluster)

    async def begin_tensors(self, update: TensorUpdate) -> TensorTarget:
        assert self.tensors is not None
        return self.tensors

    async def apply_tensors(self, update: TensorUpdate, folder: str) -> tuple[int, ...]:
        data = (Path(folder) / DATA).read_bytes()
        for name, (_, _, start) in json.loads((Path(folder) / TENSORS).read_text()).items():
            assert self.tensors is not None
            self.changed[name] = data[start : start + self.tensors.tensors[name].bytes]
        self.updates.append(update)
        return tuple(range(self._ranks))

    def what_if(self) -> tuple[LossForecast, ...]:
        lost = (r for r in range(self._ranks) if r not in self.dead)
        return tuple(
            LossForecast(
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
                stall_low_ms=40.25,
                stall_high_ms=161.0,
                moved_stall_low_ms=100.5,
                moved_stall_high_ms=400.5,
                capacity_low=0.5,
                capacity_high=0.875,
                range_source="ranges: estimated phases 2",
            )
            for rank in lost
        )

    async def apply(self, instruction: Instruction) -> tuple[int, ...]:
        self.applied.append(instruction)
        serving = [rank for rank in range(self._ranks) if rank not in self.dead]
        gone = (
            instruction.select_ranks(dict.fromkeys(range(self._ranks), "localhost"), serving)
            if instruction.ranks
            else ()
        )
        return tuple(rank for rank in serving if rank not in gone)

    def report(self, error: DeviceError) -> ErrorResponse:
        self.reported.append(error)
        return error.response

    async def kill(self, rank: int, signal: str = "SIGKILL", host: str = "") -> None:
        if not self.chaos:
            raise NotPermitted("this server was started without --chaos.")
        if not 0 <= rank < self._ranks:
            raise UnknownRequest(f"there is no rank {rank}; ranks are 0 to {self._ranks - 1}.", param="rank")
        self.killed.append((rank, signal))
        await self.lose(rank, signal)


def model_named(name: str) -> ModelInfo:
    """The fake model under another name."""
    return dataclasses.replace(MODEL, name=name)
