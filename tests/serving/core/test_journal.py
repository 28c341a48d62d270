"""Whatever becomes of the end of the file, what stands before it is there, and nothing else."""

import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.core.journal import MAGIC, Journal, frame, read_records
from serving.errors import StartError

records = st.lists(st.binary(max_size=40), max_size=8)


@given(records, st.data())
def test_a_file_cut_anywhere_gives_the_records_that_are_whole(given_records: list[bytes], data: st.DataObject) -> None:
    whole = MAGIC + b"".join(map(frame, given_records))
    cut = data.draw(st.integers(0, len(whole)))
    found, length = read_records(whole[:cut])
    assert found == given_records[: len(found)]
    assert length <= cut
    if cut >= len(MAGIC):
        rest = whole[length:cut]
        assert len(rest) < len(frame(given_records[len(found)])) if len(found) < len(given_records) else rest == b""


@given(records, st.data())
def test_a_damaged_byte_ends_the_file_before_its_record(given_records: list[bytes], data: st.DataObject) -> None:
    whole = bytearray(MAGIC + b"".join(map(frame, given_records)))
    at = data.draw(st.integers(len(MAGIC), max(len(MAGIC), len(whole) - 1)))
    if at == len(whole):
        return
    whole[at] ^= data.draw(st.integers(1, 255))
    found, length = read_records(bytes(whole))
    assert found == given_records[: len(found)]
    assert length <= at


@given(records, records, st.binary(max_size=30))
def test_what_follows_a_torn_record_is_where_it_was_cut(first: list[bytes], second: list[bytes], torn: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        journal, _ = Journal.open(Path(folder) / "j")
        journal.append(first)
        journal.close()
        file = Path(folder) / "j" / "requests.journal"
        cut = frame(b"x" * 100)[: len(torn)]
        file.write_bytes(file.read_bytes() + cut)
        journal, found = Journal.open(Path(folder) / "j")
        assert found == first
        journal.append(second)
        journal.sync()
        journal.close()
        journal, found = Journal.open(Path(folder) / "j")
        assert found == first + second
        journal.replace(second)
        journal.append(first)
        journal.close()
        assert Journal.open(Path(folder) / "j")[1] == second + first


def test_folder_and_file_are_for_their_owner_alone(tmp_path: Path) -> None:
    Journal.open(tmp_path / "j")[0].close()
    assert (tmp_path / "j").stat().st_mode & 0o777 == 0o700
    assert (tmp_path / "j" / "requests.journal").stat().st_mode & 0o777 == 0o600


def test_two_servers_do_not_share_a_journal(tmp_path: Path) -> None:
    journal, _ = Journal.open(tmp_path)
    with pytest.raises(StartError, match="another server has it"):
        Journal.open(tmp_path)
    journal.close()
    Journal.open(tmp_path)[0].close()


def test_a_disk_that_is_full_adds_nothing_and_keeps_what_was_there(tmp_path: Path) -> None:
    program = f"""
import resource, signal
from pathlib import Path
from serving.core.journal import Journal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
journal, _ = Journal.open(Path({str(tmp_path)!r}))
journal.append([b"kept"])
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
for call in (journal.append, journal.replace):
    try:
        call([b"x" * 8192])
    except OSError as error:
        print(error.strerror)
journal.append([b"after"])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env=os.environ)
    assert done.stdout.count("File too large") == 2
    assert Journal.open(tmp_path)[1] == [b"kept", b"after"]
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY
