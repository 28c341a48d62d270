"""The blocking client."""

from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import Any, Self, TypeVar, Unpack

import grpc

from serving.api.client.base import DEFAULT_ADDRESS, ClientBase, HasAddress, UnaryCall
from serving.api.client.completion import CompletionOutput, completion_outputs
from serving.api.client.options import GenerateOptions
from serving.api.client.prompts import ChatTurn, PromptLike, read_chat
from serving.api.client.streams import Stream, raise_moejax_errors
from serving.api.client.tensors import TensorParts
from serving.api.grpc.resilience_messages import event_from_proto
from serving.auth.tls import ClientTls
from serving.errors import MoejaxError
from serving.protocol.events import Event
from serving.protocol.instructions import Action, Instruction
from serving.protocol.prepared_model import ModelInfo
from serving.protocol.status import LossForecast, Status
from serving.protocol.tensors import TensorUpdate
from serving.protocol.weights import Running

T = TypeVar("T")


class Client(ClientBase):
    """A blocking client. `target` is host:port or a running server. `api_key` and `tls` are needed if the server was
    started with API keys or TLS.

    >>> from serving import Client, Server                                      # doctest: +SKIP
    >>> with Server(model="tiny") as server, Client(server) as client:          # doctest: +SKIP
    ...     client.generate("To be, or not", temperature=0, max_tokens=3).text
    ' to be,'
    """

    def __init__(
        self, target: str | HasAddress = DEFAULT_ADDRESS, *, api_key: str | None = None, tls: ClientTls | None = None
    ) -> None:
        super().__init__(target, grpc, api_key, tls)
        self._connected()  # not by the first call: threads may share a client

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection. Running streams end."""
        if (channel := self._take_channel()) is not None:
            channel.close()

    def stream(self, prompt: PromptLike, **options: Unpack[GenerateOptions]) -> Stream:
        """Start a request and iterate over its chunks.

        `prompt` is text, token ids (an array too), messages (`Message` or dicts) or a `Conversation`. The options are
        the fields of `SamplingParams`, `timeout_s` (seconds until the request ends with DeadlineExceeded) and
        `request_id`. Errors are raised while iterating.
        """
        return Stream(self._generate_call(prompt, options), self.address)

    def generate(self, prompt: PromptLike, **options: Unpack[GenerateOptions]) -> CompletionOutput:
        """The complete output, or the first of `n` outputs. Options as for `stream`."""
        return self.generate_all(prompt, **options)[0]

    def generate_all(self, prompt: PromptLike, **options: Unpack[GenerateOptions]) -> list[CompletionOutput]:
        """All `n` complete outputs. Options as for `stream`."""
        stream = self.stream(prompt, **options)
        return completion_outputs(list(stream), stream.completes, stream.scores)

    def chat(self, messages: Iterable[ChatTurn] | str, **options: Unpack[GenerateOptions]) -> CompletionOutput:
        """The assistant's next message. A plain text is one message of the user. Options as for `stream`."""
        return self.generate(read_chat(messages), **options)

    def abort(self, request_id: str) -> bool:
        """Cancel a request by its id, whichever client sent it. False when no such request runs."""
        return self._call(self._abort_call(request_id))

    def tokenize(self, prompt: PromptLike) -> tuple[int, ...]:
        """The tokens that `generate` would have for a prompt: text, or messages by the chat template."""
        return self._call(self._tokenize_call(prompt))

    def detokenize(self, token_ids: Iterable[int]) -> str:
        """The text of token ids; special tokens have none."""
        return self._call(self._detokenize_call(token_ids))

    def model(self) -> ModelInfo:
        """The model being served."""
        return self._call(self._model_call())

    def status(self) -> Status:
        """The status of the server now."""
        return self._call(self._status_call())

    def watch(self, after: int = 0, *, timeout_s: float | None = None) -> Iterator[Event]:
        """Events with a sequence above `after`: past events, then new ones as they happen.

        Raises DeadlineExceeded after `timeout_s` seconds; without it, the iterator does not end by itself.
        """
        call = self._watch_call(after, timeout_s)
        try:
            with raise_moejax_errors(self.address):
                for message in call:
                    yield event_from_proto(message)
        finally:
            call.cancel()

    def kill(self, rank: int, signal: str = "SIGKILL", *, host: str = "") -> None:
        """Kill (SIGKILL) or stop (SIGSTOP) a rank of a server started with --chaos, or corrupt an expert in its memory
        (NAN, BITFLIP), or cut its connections to other ranks (LINKS). With `host`, all ranks of that host."""
        self._call(self._kill_call(rank, signal, host))

    def what_if(self) -> list[LossForecast]:
        """The predicted cost of losing each rank and each host now."""
        return self._call(self._what_if_call())

    def plan(self) -> str:
        """The plan in force as JSON, in the format of a plan file (`moejax plan`). Empty while no rank is alive."""
        return self._call(self._plan_call())

    def apply(
        self,
        action: Action,
        *ranks: int,
        host: str = "",
        to: int | None = None,
        replace: bool = False,
        timeout_s: float = 30.0,
        model: str = "",
        version: str = "",
        running: Running = "switch",
        path: str = "",
        python: str = "",
    ) -> list[int]:
        """Make a planned change: pause, retry, drain, scale_down, scale_up, rebalance, weights or upgrade; see
        `Instruction` for the arguments. Returns the ranks that serve after it. An upgrade has only begun then; the
        status says how it goes on.
        """
        instruction = Instruction(
            action=action,
            ranks=ranks,
            host=host,
            to=to,
            replace=replace,
            timeout_s=timeout_s,
            model=model,
            version=version,
            running=running,
            path=path,
            python=python,
        )
        return self._call(self._apply_call(instruction))

    def apply_tensors(
        self,
        tensors: Iterable[tuple[str, Any]],
        *,
        version: str = "",
        base_version: str = "",
        running: Running = "switch",
        timeout_s: float = 30.0,
    ) -> list[int]:
        """Change tensors of the weights in force, as a trainer does after a step. `tensors` are (name, array): the
        names that they have in the folder of the served model, in its number formats and shapes. Tensors that are not
        among them stay as they are. `version` labels the new weights (their number unless given), `base_version` is the
        label of the weights that are changed (whichever are in force unless given); `running` and `timeout_s` as for
        `apply`. Returns the ranks that serve when the new weights are in force. Raises InvalidRequest, Conflict or
        NoCapacity, and whatever the iterable raises: the former weights are in force then, and nothing is kept.
        """
        update = TensorUpdate(version=version, base_version=base_version, running=running, timeout_s=timeout_s)
        parts = TensorParts(update, tensors)
        try:
            return self._call(self._tensors_call(parts))
        except MoejaxError:
            if parts.error is not None:
                raise parts.error from None
            raise

    def report(self, rank: int, level: int, code: str = "", message: str = "") -> str:
        """Report an error of a rank's device, of level 1 to 6. Returns the action that the server takes."""
        return self._call(self._report_call(rank, level, code, message))

    def _call(self, call: UnaryCall[T]) -> T:
        with raise_moejax_errors(self.address):
            return call.read(call.method(call.request, metadata=self._metadata))
