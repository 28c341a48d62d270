"""The interface between the surfaces and the loop: everything that a running server can do for a caller."""

import inspect
from collections.abc import AsyncIterator, Awaitable, Collection
from typing import Protocol, TypeVar, cast

from planner.plan.pools import AnyDeployment
from serving.errors import MoejaxError
from serving.protocol.events import Event
from serving.protocol.instructions import DeviceError, ErrorResponse, Instruction
from serving.protocol.prepared_model import ModelInfo
from serving.protocol.request import Call, Finished, Request, Scored, Token
from serving.protocol.status import LossForecast, Status
from serving.protocol.tensors import TensorTarget, TensorUpdate

SIGNALS = ("SIGKILL", "SIGSTOP")
SIGNALS_TO_WEIGHTS = ("NAN", "BITFLIP")
CUT_LINKS = "LINKS"
"""Arguments of `Backend.kill`: signals to the process of a rank, damage to the weights of an expert it holds, and a cut
of its connections to other ranks."""
FAULTS = (*SIGNALS, *SIGNALS_TO_WEIGHTS, CUT_LINKS)


T = TypeVar("T")


async def answered(answer: T | Awaitable[T]) -> T:
    """The answer of a backend, which the loop has at once and an edge only once its front has sent it."""
    return await cast(Awaitable[T], answer) if inspect.isawaitable(answer) else cast(T, answer)


class Backend(Protocol):
    """The interface of the loop to HTTP, gRPC and vLLM's gRPC service. Implemented by `serving.core.loop.Loop`, in an
    edge by `serving.edges.remote_backend.RemoteBackend`, and by a fake in tests. Callers take answers that may come
    later with `answered`."""

    model: ModelInfo

    @property
    def recovering(self) -> bool:
        """True while no front answers: requests wait for the next one."""
        ...

    @property
    def resumable(self) -> bool:
        """Whether calls are recorded, so that their streams can be replayed."""
        ...

    def stream(self, request: Request) -> AsyncIterator[Scored | Token | Finished]:
        """Accept a request and yield scores of its prompt, its tokens, then one Finished. Raises QueueFull,
        NoCapacity, Draining, DeadlineExceeded, Cancelled or PromptTooLong. Leaving the iterator cancels the request."""
        ...

    def replay(self, request_id: str, *, follow: bool = True) -> AsyncIterator[Scored | Token | Finished]:
        """Every item that `stream` yielded for a request of a recorded call, then, with `follow`, further ones as they
        come."""
        ...

    def register_call(self, call: Call) -> None:
        """Record a call whose requests will be streamed, so that this front and the one after it can replay it."""
        ...

    def close_call(self, call_id: str) -> None:
        """The client disconnected, or the call is complete."""
        ...

    def find_call(self, call_id: str, owner: str) -> Call | Awaitable[Call]:
        """A recorded call of that owner. Raises UnknownRequest."""
        ...

    def forget_call(self, call_id: str) -> Awaitable[None] | None:
        """Forget a recorded call: neither this front nor the one after it can replay it."""
        ...

    def abort(self, request_id: str) -> bool | Awaitable[bool]:
        """Cancel a request. False when it is unknown."""
        ...

    def fail_requests(self, request_ids: Collection[str], error: MoejaxError) -> None:
        """End those of the requests of a call that have not ended with the error that ended another one of it, so that
        each replay of the call ends as it did."""
        ...

    def first_step_at(self, request_id: str) -> float | None:
        """When a request that is being streamed left the queue, in seconds of the front's clock; None before."""
        ...

    def status(self) -> Status | Awaitable[Status]:
        """The current status."""
        ...

    def watch(self, after: int = 0) -> AsyncIterator[Event]:
        """Events with a sequence above `after`: past ones, then new ones as they happen."""
        ...

    async def kill(self, rank: int, signal: str = "SIGKILL", host: str = "") -> None:
        """Kill or stop the process of a rank, or of all ranks of a host; with SIGNALS_TO_WEIGHTS, damage an expert.
        For tests and demonstrations. Raises NotPermitted without --chaos."""
        ...

    def what_if(self) -> tuple[LossForecast, ...] | Awaitable[tuple[LossForecast, ...]]:
        """The predicted cost of losing each rank, and each host of several."""
        ...

    def deployment(self) -> AnyDeployment | Awaitable[AnyDeployment | None] | None:
        """The plan in force with its model, cluster, measured loads and traffic; None while no rank is alive."""
        ...

    async def apply(self, instruction: Instruction) -> tuple[int, ...]:
        """Carry out a planned change; returns the ranks that serve when it is done. The caller has been checked
        (`serving.protocol.instructions.permit`). Raises InvalidRequest and NoCapacity."""
        ...

    async def begin_tensors(self, update: TensorUpdate) -> TensorTarget:
        """The weights that are to be changed by tensors, and where on this machine the tensors are to be received. The
        caller has been checked. Raises InvalidRequest, NoCapacity and Conflict."""
        ...

    async def apply_tensors(self, update: TensorUpdate, folder: str) -> tuple[int, ...]:
        """Change the weights in force by the tensors that a process of this machine has received in `folder`; returns
        the ranks that serve when the new ones are in force. Raises as `begin_tensors`."""
        ...

    def report(self, error: DeviceError) -> ErrorResponse | Awaitable[ErrorResponse]:
        """Handle an error of a device. Returns what is done about it. Raises UnknownRequest."""
        ...


class FrontBackend(Backend, Protocol):
    """The interface of the loop to edges: its answers are there at once."""

    def find_call(self, call_id: str, owner: str) -> Call:
        """See `Backend.find_call`."""
        ...

    def abort(self, request_id: str) -> bool:
        """See `Backend.abort`."""
        ...

    def has_begun(self, request_id: str) -> bool:
        """Whether a request was accepted, by this front or by one before it: it is replayed, not run again."""
        ...
