"""A call can be replayed exactly, by this front and, from the journal, by the next."""

import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.core.journal import Journal, JournalReplacement, frame, read_records
from serving.core.request_log import RequestLog
from serving.errors import NoCapacity, UnknownRequest
from serving.protocol.request import Call, Finished, Request, Scored, Token
from serving.protocol.sampling import ResolvedSampling, StructuredOutputs

ITEMS = (
    Scored(1, (-0.5, -float("inf")), (((4, -0.5), (1, -2.0)), ())),
    Token(0, 7, -0.1, 3, top=((7, -0.1), (2, -3.5)), cached_tokens=32),
    Token(1, 9, -1 / 3, 3, degraded=True),
    Token(2, 1, -0.0, 4, drafted=True),
)
ENDS = (Finished("length", 32), Finished("cancelled"), NoCapacity("no rank", retry_after_s=2.0))


def call(name: str, answers: int = 1, **fields: Any) -> Call:
    """A call with every field of a request in use."""
    requests = tuple(
        Request(
            id=f"{name}-{i}",
            prompt=(1, 2, 3),
            sampling=ResolvedSampling(
                max_tokens=9,
                seed=i,
                temperature=0.7,
                stop_tokens=frozenset({5, 2}),
                logit_bias=((3, -1.5),),
                prompt_logprobs=2,
                structured_outputs=StructuredOutputs("regex", "[a-z]+"),
            ),
            deadline=1e9,
        )
        for i in range(answers)
    )
    return Call(id=f"{name}-0", requests=requests, stop=("\n",), form={"chat": True, "body": {"n": 1}}, **fields)


def opened(folder: str | Path, **fields: Any) -> RequestLog:
    journal, records = Journal.open(Path(folder))
    return RequestLog(journal, records, **fields)


def compact_if_needed(request_log: RequestLog) -> None:
    """Compact the journal, if that is due."""
    if request_log.needs_compaction and (anew := request_log.begin_compaction()) is not None:
        anew.write()
        request_log.finish_compaction(anew)


def told(request_log: RequestLog, name: str) -> tuple[Any, ...]:
    return tuple(repr(item) for item in request_log.items(name))


@given(st.permutations([0, 0, 0, 0, 0, 1, 1, 1, 1, 1]), st.sampled_from(ENDS), st.data())
def test_a_request_log_cut_anywhere_is_a_prefix(order: list[int], end: Any, data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as folder:
        request_log = opened(folder, clock=lambda: 5.0, wall=lambda: 7.0)
        one = call("a", 2)
        request_log.register_call(one)
        for request in one.requests:
            request_log.record_accepted(request.id)
        left = {name: [*ITEMS, end] for name in ("a-0", "a-1")}
        for which in order:
            name = f"a-{which}"
            request_log.record([(name, left[name].pop(0))])
        request_log.close()
        file = Path(folder) / "requests.journal"
        whole = file.read_bytes()
        file.write_bytes(whole[: data.draw(st.integers(0, len(whole)))])
        again = opened(folder)
        for name in ("a-0", "a-1"):
            known = told(again, name)
            assert known == tuple(map(repr, [*ITEMS, end]))[: len(known)]
        if again.running():
            assert [r.prompt for r in again.running()[0].requests] == [(1, 2, 3)] * 2


@given(st.lists(st.integers(0, 8), max_size=12))
def test_records_that_come_again_say_nothing_new(again: list[int]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        request_log = opened(folder)
        request_log.register_call(call("a"))
        request_log.record_accepted("a-0")
        for item in (*ITEMS, ENDS[0]):
            request_log.record([("a-0", item)])
        request_log.close()
        file = Path(folder) / "requests.journal"
        records, _ = read_records(file.read_bytes())
        with file.open("ab") as out:
            out.writelines(frame(records[i % len(records)]) for i in again)
        assert told(opened(folder), "a-0") == tuple(map(repr, (*ITEMS, ENDS[0])))


def test_a_request_comes_back_as_it_was(tmp_path: Path) -> None:
    request_log = opened(tmp_path)
    request_log.register_call(call("a", owner="key", created=5))
    request_log.record_accepted("a-0")
    request_log.close()
    back = opened(tmp_path, wall=lambda: 0.0, clock=lambda: 0.0)
    (found,) = back.running()
    assert found.requests[0].deadline is not None
    plain = call("a", owner="key", created=5)
    assert [r.sampling for r in found.requests] == [r.sampling for r in plain.requests]
    assert found.requests[0].sampling.stop_tokens == frozenset({5, 2})
    assert (found.stop, found.owner, found.form, found.created) == (plain.stop, "key", plain.form, 5)


def test_a_call_is_replayed_to_its_owner_alone_and_not_for_ever(tmp_path: Path) -> None:
    now = [0.0]
    request_log = opened(tmp_path, retention_s=60.0, clock=lambda: now[0])
    request_log.register_call(call("a", owner="me"))
    with pytest.raises(UnknownRequest):
        request_log.find_call("a-0", "me")
    request_log.record_accepted("a-0")
    assert request_log.find_call("a-0", "me").id == "a-0"
    with pytest.raises(UnknownRequest):
        request_log.find_call("a-0", "you")
    request_log.close_call("a-0")
    assert request_log.items("a-0") == (Finished("cancelled"),)
    now[0] = 61.0
    request_log.forget_expired()
    with pytest.raises(UnknownRequest):
        request_log.find_call("a-0", "me")


def test_a_forgotten_call_is_gone_also_for_the_next_front(tmp_path: Path) -> None:
    request_log = opened(tmp_path)
    for name in ("a", "b"):
        request_log.register_call(call(name, owner="me"))
        request_log.record_accepted(f"{name}-0")
    request_log.close_call("a-0")
    request_log.forget_call("a-0")
    request_log.forget_call("a-0")
    for _ in range(2):
        with pytest.raises(UnknownRequest):
            request_log.find_call("a-0", "me")
        assert request_log.find_call("b-0", "me").id == "b-0"
        request_log.close()
        request_log = opened(tmp_path)


def test_a_call_that_was_refused_leaves_nothing(tmp_path: Path) -> None:
    request_log = opened(tmp_path)
    request_log.register_call(call("a"))
    request_log.close_call("a-0")
    request_log.close()
    assert opened(tmp_path).running() == []


def test_the_journal_does_not_grow_with_what_is_over(tmp_path: Path) -> None:
    now = [0.0]
    request_log = opened(tmp_path, retention_s=1.0, clock=lambda: now[0])
    for number in range(400):
        now[0] += 0.1
        request_log.register_call(call(str(number)))
        request_log.record_accepted(f"{number}-0")
        request_log.record([(f"{number}-0", Token(i, 5, -0.5, 1)) for i in range(100)])
        request_log.record([(f"{number}-0", Finished("length"))])
        request_log.forget_expired()
        compact_if_needed(request_log)
    assert (tmp_path / "requests.journal").stat().st_size < 2 << 20


def test_a_journal_that_cannot_be_written_is_reported_and_written_when_it_can_again(tmp_path: Path) -> None:
    class Full(Journal):
        full = False

        def append(self, records: Any) -> None:
            if self.full:
                raise OSError(28, "No space left on device")
            super().append(records)

        def begin_replacement(self) -> JournalReplacement:
            if self.full:
                raise OSError(28, "No space left on device")
            return super().begin_replacement()

    now = [0.0]
    journal, _ = Full.open(tmp_path)
    request_log = RequestLog(journal, clock=lambda: now[0])
    request_log.register_call(call("a"))
    request_log.record_accepted("a-0")
    journal.full = True
    request_log.record([("a-0", ITEMS[0]), ("a-0", ITEMS[1])])
    assert request_log.write_error is not None
    assert "No space left" in request_log.write_error
    request_log.record([("a-0", ITEMS[2])])
    now[0] = 10.0
    compact_if_needed(request_log)
    assert request_log.write_error is not None
    assert not request_log.needs_compaction
    journal.full, now[0] = False, 20.0
    compact_if_needed(request_log)
    assert request_log.write_error is None
    request_log.record([("a-0", ITEMS[3])])
    request_log.close()
    assert told(opened(tmp_path), "a-0") == tuple(map(repr, ITEMS))


@given(st.data())
def test_a_kill_at_any_moment_of_a_compaction_loses_no_sent_item(data: st.DataObject) -> None:
    names = ("a-0", "a-1", "b-0")
    left = {name: [*ITEMS, ENDS[0]] for name in names}
    heard: dict[str, list[Any]] = {name: [] for name in names}
    moments: list[tuple[dict[str, bytes], dict[str, tuple[str, ...]]]] = []
    pwrite, rename, writing = os.pwrite, os.rename, False

    def note() -> None:
        nonlocal writing
        before, writing = writing, False
        name = data.draw(st.sampled_from(names))
        if left[name]:
            item = left[name].pop(0)
            request_log.record([(name, item)])
            heard[name].append(item)
        writing = before

    def look() -> None:
        files = {path.name: path.read_bytes() for path in folder.iterdir()}
        moments.append((files, {name: tuple(map(repr, items)) for name, items in heard.items()}))

    def in_halves(file: int, written: Any, at: int) -> int:
        half = len(written) // 2
        pwrite(file, written[:half], at)
        look()
        pwrite(file, written[half:], at + half)
        look()
        if writing and data.draw(st.booleans()):
            note()
        return len(written)

    def model_named(*paths: Any) -> None:
        look()
        rename(*paths)
        look()

    with tempfile.TemporaryDirectory() as place, pytest.MonkeyPatch.context() as patch:
        folder = Path(place) / "j"
        request_log = opened(folder)
        for one in (call("a", 2), call("b")):
            request_log.register_call(one)
            request_log.record_accepted(f"{one.id}")
        for _ in range(data.draw(st.integers(0, 12))):
            note()
        patch.setattr(os, "pwrite", in_halves)
        patch.setattr(os, "rename", model_named)
        for _ in range(data.draw(st.integers(1, 2))):
            anew = request_log.begin_compaction()
            assert anew is not None
            writing = True
            anew.write()
            writing = False
            note()
            request_log.finish_compaction(anew)
            note()
        request_log.close()
        patch.undo()
        whole = tuple(map(repr, [*ITEMS, ENDS[0]]))
        for number, (files, known) in enumerate(moments):
            killed = Path(place) / str(number)
            killed.mkdir()
            for name, content in files.items():
                (killed / name).write_bytes(content)
            again = opened(killed)
            assert [again.find_call(name, "").id for name in ("a-0", "b-0")] == ["a-0", "b-0"]
            for name in names:
                found = told(again, name)
                assert found == whole[: len(found)]
                assert found[: len(known[name])] == known[name]
            again.close()
