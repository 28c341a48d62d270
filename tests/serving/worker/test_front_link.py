"""The link of a real rank process to its front."""

import time
import types
from pathlib import Path
from typing import cast

import pytest

from serving.executor.executor import RankExecutor
from serving.executor.failure_detector import FailureDetectorSettings
from serving.executor.incarnation import Loss
from serving.launch.rank_channel import RankChannel
from serving.launch.rank_listener import RankListener
from serving.launch.rank_process import LocalStarter
from serving.proto.moejax.v1 import link_pb2
from serving.worker import front_link
from serving.worker.front_link import FrontLink, FrontStream, ReceivedCommand
from serving.worker.rank import RankWorker
from tests.support.waiting import until

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize(("heartbeat_s", "count"), [(0.02, 30), (0.3, 6)])
async def test_a_rank_sends_heartbeats_no_more_often_than_its_front_wants(
    tmp_path: Path, heartbeat_s: float, count: int
) -> None:
    losses: list[Loss] = []
    health = FailureDetectorSettings(heartbeat_floor_s=60, step_floor_s=60)
    executor = RankExecutor(health, losses.append, LocalStarter(tmp_path, threads=1))
    await executor.open(RankListener(heartbeat_s=heartbeat_s))
    try:
        rank = executor.spawn(0)
        await executor.wait_attached(0)
        executor.monitor(0)
        began = time.monotonic()
        await until(lambda: len(rank.heartbeat_gaps) >= count)
        # They may arrive together however far apart they were sent; of the first ones some were on their way before.
        assert time.monotonic() - began >= count / 2 * heartbeat_s
    finally:
        await executor.close()
    assert not losses


async def test_an_exception_in_a_step_is_reported_before_the_rank_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """The main thread alone: its stream is a list, and the end of the process an exception."""

    class Ended(BaseException):
        pass

    def end(code: int) -> None:
        raise Ended(code)

    def broken(command: link_pb2.Step, received_at: float) -> link_pb2.Report:
        raise IndexError("index 288 is out of bounds")

    steps = types.SimpleNamespace(step=broken, run_beside_host=True)
    rank = types.SimpleNamespace(state=types.SimpleNamespace(rank=3), steps=steps)
    reports: list[link_pb2.Report] = []
    stream = types.SimpleNamespace(ended=False, send=reports.append)
    monkeypatch.setattr(front_link, "LAST_REPORT_S", 0.0)
    monkeypatch.setattr(front_link.os, "_exit", end)
    monkeypatch.setattr(front_link.threading.Thread, "start", lambda thread: None)
    link = FrontLink(cast(RankWorker, rank), cast(RankChannel, None), "", stays=False)
    link._stream = cast(FrontStream, stream)
    command = link_pb2.Command(step=link_pb2.Step(step=7))
    link._received.put(ReceivedCommand(link._stream, command, 0.0))
    with pytest.raises(Ended, match="1"):
        link.run()
    (report,) = reports
    assert report.rank == 3
    assert report.raised.error == "IndexError: index 288 is out of bounds"
    assert report.raised.trace.endswith('in broken | raise IndexError("index 288 is out of bounds")')
