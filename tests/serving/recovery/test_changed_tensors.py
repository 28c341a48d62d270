"""Changed tensors come into force as other weights do, or leave those in force and nothing on the disk."""

import asyncio
import dataclasses
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

import serving.protocol.tensors
import serving.recovery.weights_update
from serving.errors import Conflict, InvalidRequest, NoCapacity
from serving.launch.version_folders import incoming_folder
from serving.launch.weights_record import VERSIONS, WeightsRecord
from serving.protocol.instructions import Instruction
from serving.protocol.prepared_model import PreparedModel
from serving.protocol.tensors import BaseWeights, TensorType, TensorUpdate
from serving.recovery.membership import Membership
from simulation.hand_model import PREPARED
from tests.serving.recovery.test_weights_update import serving_streams
from tests.support.recovery_machine import Machine

pytestmark = pytest.mark.usefixtures("no_processes")

KNOWN = {"a": TensorType("float32", (2,), 8)}


class Tool:
    """The process that changes folders, without one: the bases that it was asked about."""

    def __init__(self) -> None:
        self.listed: list[BaseWeights] = []
        self.changed: list[BaseWeights] = []
        self.error: Exception | None = None

    async def tensors(self, base: BaseWeights) -> dict[str, TensorType]:
        self.listed.append(base)
        return KNOWN

    async def change(self, base: BaseWeights, changes: Path, target: Path) -> None:
        self.changed.append(base)
        target.mkdir()
        (target / "model").write_text((changes / "data").read_text())
        if self.error is not None:
            raise self.error


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> Tool:
    tool = Tool()
    monkeypatch.setattr(BaseWeights, "tensors", lambda base: tool.tensors(base))
    monkeypatch.setattr(BaseWeights, "change", lambda base, changes, target: tool.change(base, changes, target))

    async def prepare(model: str, like: PreparedModel, **_: object) -> PreparedModel:
        assert Path(model, "model").is_file()
        return dataclasses.replace(like, store=model, content=Path(model, "model").read_text())

    monkeypatch.setattr(serving.recovery.weights_update, "prepare_weights", prepare)
    return tool


@asynccontextmanager
async def server(tmp_path: Path) -> AsyncIterator[Machine]:
    async with serving_streams(WeightsRecord(tmp_path, PREPARED.content)) as (m, _):
        yield m


async def send(m: Machine, content: str, update: TensorUpdate) -> None:
    """As the surface does with a whole stream."""
    target = await m.loop.begin_tensors(update)
    assert target.tensors == KNOWN
    async with incoming_folder(target.folder) as folder:
        (folder / "data").write_text(content)
        await m.loop.apply_tensors(dataclasses.replace(update, base_version=target.base_version), str(folder))


def folders(tmp_path: Path) -> list[Path]:
    place = tmp_path / VERSIONS
    return sorted(place.iterdir()) if place.is_dir() else []


def test_changes_of_changes_come_into_force_and_one_folder_is_kept(tool: Tool, tmp_path: Path) -> None:
    async def main() -> None:
        async with server(tmp_path) as m:
            await send(m, "one", TensorUpdate(version="7", base_version="0"))
            await send(m, "two", TensorUpdate(base_version="7", running="finish"))
            weights = m.failover.membership.weights
            assert (weights.number, weights.label, weights.content) == (2, "2", "two")
            assert folders(tmp_path) == [Path(weights.model)]
            assert (tmp_path / "weights.json").is_file()
        assert m.loop.status().weights_switches == 2
        assert [base.model for base in tool.listed] == ["fake"], "tensors keep their names, formats and shapes"
        first, second = tool.changed
        assert (first.model, first.content) == ("fake", PREPARED.content)
        assert (Path(second.model).parent, second.content) == (tmp_path / VERSIONS, "one")
        assert WeightsRecord(tmp_path, PREPARED.content).load() == weights

    asyncio.run(main())


def test_a_folder_is_removed_once_whole_weights_are_in_force(tool: Tool, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "model").write_text("other")

    async def main() -> None:
        async with server(tmp_path / "run") as m:
            await send(m, "one", TensorUpdate())
            await m.loop.apply(Instruction(action="weights", model=str(other)))
            assert folders(tmp_path / "run") == []
            await send(m, "two", TensorUpdate())
        assert [base.model for base in tool.listed] == ["fake", str(other)]
        assert other.is_dir()

    asyncio.run(main())


def test_a_folder_stays_while_a_rank_is_being_started_that_may_read_it(
    tool: Tool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        async with server(tmp_path) as m:
            await send(m, "one", TensorUpdate())
            one = Path(m.failover.membership.weights.model)
            with monkeypatch.context() as patch:
                patch.setattr(Membership, "is_incoming", lambda *_: True)
                await send(m, "two", TensorUpdate())
            two = Path(m.failover.membership.weights.model)
            assert folders(tmp_path) == sorted((one, two))
            await m.loop.begin_tensors(TensorUpdate())
            assert folders(tmp_path) == [two]

    asyncio.run(main())


def test_without_a_record_the_folder_lasts_as_long_as_the_server(tool: Tool) -> None:
    async def main() -> Path:
        async with serving_streams() as (m, _):
            await send(m, "one", TensorUpdate())
            await send(m, "two", TensorUpdate())
            folder = Path(m.failover.membership.weights.model)
            assert (folder / "model").read_text() == "two"
            assert list(folder.parent.iterdir()) == [folder]
        return folder

    folder = asyncio.run(main())
    assert not folder.parent.exists()


def test_a_change_of_other_weights_than_those_in_force_is_refused_with_both(tool: Tool, tmp_path: Path) -> None:
    async def main() -> None:
        async with server(tmp_path) as m:
            with pytest.raises(Conflict, match=r"base_version is '5', and the weights in force have the version '0'"):
                await send(m, "one", TensorUpdate(base_version="5"))
            target = await m.loop.begin_tensors(TensorUpdate())
            await send(m, "one", TensorUpdate(version="1"))
            late = TensorUpdate(base_version=target.base_version)  # others came into force while it was received
            async with incoming_folder(target.folder) as folder:
                (folder / "data").write_text("late")
                with pytest.raises(Conflict, match="is '0', and the weights in force have the version '1'"):
                    await m.loop.apply_tensors(late, str(folder))
            assert m.loop.status().weights_version == "1"
            assert len(folders(tmp_path)) == 1

    asyncio.run(main())


@pytest.mark.parametrize("error", [InvalidRequest("its files have changed since"), NoCapacity("OSError: no space")])
def test_a_folder_that_cannot_be_made_leaves_nothing(tool: Tool, tmp_path: Path, error: Exception) -> None:
    tool.error = error

    async def main() -> None:
        async with server(tmp_path) as m:
            with pytest.raises(type(error), match=str(error)):
                await send(m, "one", TensorUpdate())
            status = m.loop.status()
            assert (status.weights_version, status.next_weights_version) == ("0", "")
            assert folders(tmp_path) == []

    asyncio.run(main())


def test_so_do_changed_weights_that_a_rank_cannot_read(tool: Tool, tmp_path: Path) -> None:
    async def main() -> None:
        async with server(tmp_path) as m:
            m.executor.store.readable = False
            with pytest.raises(InvalidRequest, match=r"rank . cannot load"):
                await send(m, "one", TensorUpdate())
            assert (m.loop.status().weights_version, folders(tmp_path)) == ("0", [])
            m.executor.store.readable = True

    asyncio.run(main())


def test_without_the_memory_no_tensor_is_asked_for(tool: Tool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving.recovery.weights_update, "free_bytes", lambda: 7)

    async def main() -> None:
        async with server(tmp_path) as m:
            with pytest.raises(NoCapacity, match="MiB of memory are free"):
                await m.loop.begin_tensors(TensorUpdate())
            assert (tool.listed, folders(tmp_path)) == ([], [])

    asyncio.run(main())


def test_while_weights_are_being_brought_in_no_tensors_are_taken(tool: Tool, tmp_path: Path) -> None:
    async def main() -> None:
        async with server(tmp_path) as m:
            m.loop.engine.maintenance.weights.next_label = "9"
            with pytest.raises(Conflict, match="weights version 9 is being brought in"):
                await m.loop.begin_tensors(TensorUpdate())
            m.loop.engine.maintenance.weights.next_label = ""

    asyncio.run(main())


@pytest.mark.parametrize(
    ("said", "kind", "text"),
    [
        (b"a warning\nCheckpointError: m has changed\n", InvalidRequest, "cannot be changed: CheckpointError: m has"),
        (b"OSError: [Errno 28] No space left on device", NoCapacity, "No space left"),
        (b"", InvalidRequest, "the process that changes them ended with 1"),
    ],
)
def test_the_last_line_of_the_tool_is_the_error(
    monkeypatch: pytest.MonkeyPatch, said: bytes, kind: type[Exception], text: str
) -> None:
    async def run(*arguments: str, show: bool) -> tuple[int, bytes, bytes]:
        return 1, b"", said

    monkeypatch.setattr(serving.protocol.tensors, "run_tool", run)
    base = BaseWeights(model="m", content="c", served=PREPARED, how="replicated", mtp=True)
    with pytest.raises(kind, match=text):
        asyncio.run(base.tensors())
