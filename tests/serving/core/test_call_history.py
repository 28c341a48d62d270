"""A standby front that has read a journal piece by piece knows the same as one that reads all of it."""

import os
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.core import call_history, request_log
from serving.core.call_history import JournalFollower
from serving.core.journal import Journal, JournalReader, frame
from serving.core.request_log import RequestLog
from serving.errors import UnknownRequest
from serving.protocol.request import Call, Finished, Request, Token
from serving.protocol.sampling import ResolvedSampling

NAMES = ("a", "b", "c")


def call(name: str) -> Call:
    return Call(
        id=name, requests=(Request(id=f"{name}-0", prompt=(1, 2), sampling=ResolvedSampling(max_tokens=9, seed=1)),)
    )


def start(log: RequestLog, name: str) -> None:
    log.register_call(call(name))
    log.record_accepted(f"{name}-0")


def compact(log: RequestLog) -> None:
    compaction = log.begin_compaction()
    assert compaction is not None
    compaction.write()
    log.finish_compaction(compaction)


def known(log: RequestLog) -> dict[str, tuple[str, ...]]:
    return {name: tuple(map(repr, log.items(f"{name}-0"))) for name in NAMES}


@given(st.lists(st.sampled_from(["token", "read", "end", "forget", "compact", "shorten"]), max_size=40), st.data())
def test_a_follower_knows_what_the_whole_journal_says(steps: list[str], data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as place, pytest.MonkeyPatch.context() as patch:
        patch.setattr(call_history, "READ_BYTES", data.draw(st.sampled_from([1, 300, 1 << 18])))
        folder = Path(place)
        log, follower = RequestLog.open(folder, retention_s=60.0), JournalFollower(folder, 60.0)
        indices = dict.fromkeys(NAMES, 0)
        for name in NAMES:
            start(log, name)
        for step in steps:
            name = data.draw(st.sampled_from(NAMES))
            if step == "token":
                log.record([(f"{name}-0", Token(indices[name], 7, -0.5, 1))])
                indices[name] += 1
            elif step == "end":
                log.record([(f"{name}-0", Finished("length"))])
            elif step == "forget":
                log.forget_call(name)
            elif step == "compact":
                compact(log)
            elif step == "shorten":  # a write that failed: its records were in the file, and others take their place
                file = folder / "requests.journal"
                before = file.stat().st_size
                with file.open("ab") as out:
                    out.write(frame(b'{"told":[]}'))
                follower.read()
                os.truncate(file, before)
            else:
                follower.read()
        log.close()
        taken = RequestLog.open(folder, retention_s=60.0, follower=follower)
        found = known(taken), [each.id for each in taken.running()]
        start(taken, "d")  # what is written next stands behind what is there
        taken.close()
        fresh = RequestLog.open(folder, retention_s=60.0)
        assert found == (known(fresh), [each.id for each in fresh.running() if each.id != "d"])
        assert fresh.find_call("d", "").id == "d"
        assert found[0] == known(log)
        fresh.close()


def test_a_file_in_the_journals_place_is_read_from_its_begin(tmp_path: Path) -> None:
    journal, _ = Journal.open(tmp_path)
    reader = JournalReader(tmp_path)
    journal.append([b"one", b"two"])
    assert reader.read(30) == [b"one"]
    assert reader.read(3) == [b"two"]  # a record that is longer than what is read at once
    assert reader.read() == []
    for _ in range(3):  # an inode that is free again must not pass for the one before
        journal.replace([b"three", b"two"])
        assert reader.read() == [b"three", b"two"]
    journal.close()
    (tmp_path / "requests.journal").unlink()
    assert reader.read() == []


def test_a_file_that_one_call_does_not_read_is_read_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal, _ = Journal.open(tmp_path)
    journal.append([b"one", b"two", b"three"])
    journal.close()
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda file, size, at: pread(file, min(size, 7), at))
    again, records = Journal.open(tmp_path)
    assert records == [b"one", b"two", b"three"]
    assert again.size == (tmp_path / "requests.journal").stat().st_size
    again.close()


def test_a_front_that_takes_over_knows_what_was_compacted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(request_log, "MIN_COMPACTION_BYTES", 1)
    log = RequestLog.open(tmp_path, retention_s=60.0)
    for name in NAMES:
        start(log, name)
    assert log.needs_compaction
    compact(log)
    log.close()
    again = RequestLog.open(tmp_path, retention_s=60.0)
    assert not again.needs_compaction
    while not again.needs_compaction:
        again.record([("a-0", Token(len(again.items("a-0")), 7, -0.5, 1))])
    sizes = (tmp_path / "requests.journal").stat().st_size
    compact(again)
    assert (tmp_path / "requests.journal").stat().st_size < sizes


def test_an_ended_call_expires_through_fronts_that_follow_one_another(tmp_path: Path) -> None:
    now = [1000.0]

    def opened() -> RequestLog:
        journal, records = Journal.open(tmp_path)
        return RequestLog(journal, records, retention_s=60.0, clock=lambda: now[0] - 1000.0, wall=lambda: now[0])

    log = opened()
    start(log, "a")
    log.record([("a-0", Finished("length"))])
    for number in range(7):  # a front dies every ten seconds
        assert log.find_call("a", "").id == "a"
        start(log, f"other-{number}")
        log.record([(f"other-{number}-0", Finished("length"))])
        compact(log)
        log.close()
        log = opened()
        log.forget_expired()
        now[0] += 10.0
    with pytest.raises(UnknownRequest):
        log.find_call("a", "")


def test_the_time_in_which_no_front_runs_does_not_count(tmp_path: Path) -> None:
    now = [0.0]

    def opened() -> RequestLog:
        journal, records = Journal.open(tmp_path)
        return RequestLog(journal, records, retention_s=60.0, clock=lambda: now[0], wall=lambda: now[0])

    log = opened()
    for name in ("a", "b"):
        start(log, name)
        now[0] += 20.0
        log.record([(f"{name}-0", Finished("length"))])
    log.close()
    now[0] += 3600.0
    log = opened()
    log.forget_expired()
    assert log.find_call("a", "").id == "a"
    now[0] += 45.0
    log.forget_expired()
    assert log.find_call("b", "").id == "b"
    with pytest.raises(UnknownRequest):
        log.find_call("a", "")
