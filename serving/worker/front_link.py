"""A rank's link to its front: one stream at a time, commands from it and reports to it.

The receiver thread reads commands. It obeys Abort and Stop itself and queues the others for the main thread, which
obeys them in order; Prepare and StageWeights are handed on to threads of their own, so that they run beside steps.
"""

import concurrent.futures
import os
import queue
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from typing import Any, NamedTuple

import grpc

from serving.launch.last_words import exception_words
from serving.launch.rank_channel import RankChannel
from serving.launch.rank_listener import HEARTBEAT_METADATA, HEARTBEAT_S
from serving.proto.moejax.v1 import link_pb2, link_pb2_grpc
from serving.worker.rank import RankWorker

REDIAL_S = 0.05
"""Seconds between two attempts to reach a front after the last one has gone."""
LAST_REPORT_S = 1.0
"""Seconds that a rank which raised an exception waits for its end by the front."""
MAX_ERROR_CHARACTERS = 2000
OUT_OF_TURN = frozenset({"abort", "stop"})
"""Commands that the receiver thread obeys, while a step may run."""


class FrontStream:
    """One stream to a front, from Hello to its end. Reports that are sent after its end are dropped."""

    def __init__(self, channel: grpc.Channel, hello: link_pb2.Report) -> None:
        self.ended = False
        self._reports: queue.Queue[link_pb2.Report | None] = queue.Queue()
        self._reports.put(hello)
        self._call: Any = link_pb2_grpc.RankLinkStub(channel).Attach(iter(self._reports.get, None))

    def heartbeat_s(self) -> float:
        """Seconds between two heartbeats that this front wants. Blocks until the front has accepted the stream, or
        the stream has ended."""
        return float(dict(self._call.initial_metadata()).get(HEARTBEAT_METADATA, HEARTBEAT_S))

    def commands(self) -> Iterator[link_pb2.Command]:
        """Commands as they arrive. Raises grpc.RpcError when the stream breaks."""
        return iter(self._call)

    def send(self, report: link_pb2.Report) -> None:
        """Send a report."""
        if not self.ended:
            self._reports.put(report)

    def end(self) -> None:
        """Mark the stream as ended."""
        self.ended = True
        self._reports.put(None)


class ReceivedCommand(NamedTuple):
    """A command for the main thread, with the stream that its answer goes to and when it came (`perf_counter`)."""

    stream: FrontStream
    command: link_pb2.Command
    received_at: float


class FrontLink:
    """The link of a rank to its front. A rank that `stays` dials the next front when its front dies; any other ends."""

    def __init__(self, rank: RankWorker, channel: RankChannel, token: str, *, stays: bool) -> None:
        self._rank = rank
        self._channel = channel
        self._token = token
        self._stays = stays
        self._received: queue.Queue[ReceivedCommand] = queue.Queue()
        self._stream: FrontStream | None = None
        self._heartbeat_s = HEARTBEAT_S
        self._loader = concurrent.futures.ThreadPoolExecutor(1, "loader")
        self._stager = concurrent.futures.ThreadPoolExecutor(1, "stager")

    def run(self) -> None:
        """Obey commands until the front sends Stop or, unless this rank stays, has gone. Ends the process. An exception
        in a step ends it, too: what the rank holds cannot be trusted then."""
        threading.Thread(target=self._receive, daemon=True, name="receiver").start()
        threading.Thread(target=self._send_heartbeats, daemon=True, name="heartbeat").start()
        try:
            self._obey_commands()
        except Exception as error:
            traceback.print_exc()
            self._report_exception(error)
            os._exit(1)

    def _report_exception(self, error: Exception) -> None:
        """Report the exception that ends this rank. The front kills it then; so it waits a moment for that."""
        stream = self._stream
        if stream is not None and not stream.ended:
            text, trace = exception_words(error)
            stream.send(link_pb2.Report(rank=self._rank.state.rank, raised=link_pb2.Raised(error=text, trace=trace)))
            time.sleep(LAST_REPORT_S)

    def _obey_commands(self) -> None:
        steps, free_since = self._rank.steps, 0.0
        while True:
            stream, command, received_at = self._received.get()
            name = command.WhichOneof("what")
            if name is not None and not stream.ended:
                if name == "step":
                    report = steps.step(command.step, max(received_at, free_since))
                    self._send_copied(stream)
                    stream.send(report)
                elif name == "prepare":
                    self._loader.submit(self._obey, stream, command, name)
                elif name == "stage_weights":
                    self._stager.submit(self._obey, stream, command, name)
                else:
                    self._replicate(stream)
                    self._obey(stream, command, name)
            if self._received.empty() or not steps.run_beside_host:
                self._replicate(stream)
            free_since = time.perf_counter()

    def _obey(self, stream: FrontStream, command: link_pb2.Command, name: str) -> None:
        """Run the handler of a command, and send Done or Failed."""
        began, rank = time.perf_counter(), self._rank.state.rank
        try:
            fields = self._rank.handlers[name](getattr(command, name))
        except Exception as error:
            text = f"{type(error).__name__}: {error}"
            print(f"rank {rank}: {name} failed: {text}", file=sys.stderr, flush=True)
            failed = link_pb2.Failed(id=command.id, error=text[:MAX_ERROR_CHARACTERS])
            stream.send(link_pb2.Report(rank=rank, failed=failed))
            return
        self._send_copied(stream)
        milliseconds = 1e3 * (time.perf_counter() - began)
        done = link_pb2.Done(
            id=command.id, milliseconds=milliseconds, compiles=self._rank.state.compiles.count, **fields
        )
        stream.send(link_pb2.Report(rank=rank, done=done))

    def _replicate(self, stream: FrontStream) -> None:
        self._rank.kv_cache.replicate()
        self._send_copied(stream)

    def _send_copied(self, stream: FrontStream) -> None:
        for report in self._rank.kv_cache.take_reports():
            stream.send(report)

    def _receive(self) -> None:
        while True:
            with self._channel.open() as channel:
                refused, why = self._receive_from(FrontStream(channel, self._rank.hello(self._token)))
            if refused or not self._stays:
                # Nothing here is worth an orderly end: a rank may be killed at any time, and a collective may hang.
                print(f"rank {self._rank.state.rank}: the front is gone: {why}", file=sys.stderr, flush=True)
                os._exit(0)
            self._rank.front_lost()
            time.sleep(REDIAL_S)

    def _receive_from(self, stream: FrontStream) -> tuple[bool, str]:
        """Take commands until the stream ends. Returns whether the front refused this rank, and why it ended."""
        self._stream = stream
        try:
            self._heartbeat_s = stream.heartbeat_s()
            for command in stream.commands():
                name = command.WhichOneof("what")
                if name == "abort":
                    self._rank.abort(command.abort.epoch, command.abort.connecting, links=command.abort.links)
                elif name == "stop":
                    os._exit(0)
                else:
                    self._received.put(ReceivedCommand(stream, command, time.perf_counter()))
            return False, "it closed the stream"
        except grpc.RpcError as error:
            code: grpc.StatusCode = error.code()  # pyright: ignore[reportAttributeAccessIssue]
            return code == grpc.StatusCode.UNAUTHENTICATED, code.name
        finally:
            stream.end()

    def _send_heartbeats(self) -> None:
        heartbeat = link_pb2.Report(rank=self._rank.state.rank, heartbeat=link_pb2.Heartbeat())
        while True:
            time.sleep(self._heartbeat_s)
            if self._stream is not None:
                self._stream.send(heartbeat)
