"""A rank's end: copies go to shared memory where there is some, and to the front otherwise."""

import os

import numpy as np
import pytest

from serving.cache_copies import CacheCopies
from serving.cache_copy import NotCopied
from serving.protector import MESSAGE_BYTES, Protector, restored_rows
from serving.proto.moejax.v1 import link_pb2

AT = np.arange(5)
ROWS = np.arange(5 * 2 * 3, dtype=np.float32).reshape(5, 2, 3)
"""Five entries of two layers."""


def copies(way: str) -> CacheCopies:
    return CacheCopies.of(way, 1, entries=16, entry_bytes=24)


def test_a_rank_that_may_not_open_its_copy_tells_and_is_given_entries_the_same_way():
    made = copies("memory")
    command = made.fresh(0)
    assert made.maps(0)
    command.cache_copy = f"/proc/{os.getpid()}/fd/99999"
    protector = Protector.of(command)
    assert protector is not None
    protector.copy(AT + 3, AT, AT, ROWS)
    protector.seal(7)
    for message in protector.told():
        made.told(0, message)
    assert not made.maps(0)
    assert protector.told() == []
    made.lost(0)
    kept = made.find(1)
    assert kept is not None
    assert kept.copy.sealed == 7
    assert kept.copy.read(AT + 3, AT, AT).view(np.float32).tolist() == ROWS.reshape(5, -1).tolist()
    made.close()


def test_what_is_too_large_for_one_message_is_told_in_several_and_sealed_by_the_last():
    protector = Protector.of(link_pb2.Configure(tell_copies=True))
    assert protector is not None
    rows = np.zeros((3, 1, MESSAGE_BYTES // 8 + 1), np.float32)
    protector.copy(AT[:3], AT[:3], AT[:3], rows)
    protector.seal(1)
    told = protector.told()
    assert [len(message.entries) // 4 for message in told] == [1, 1, 1, 0]
    assert [message.HasField("sealed") for message in told] == [False, False, False, True]


@pytest.mark.parametrize("first", [0, 2])
def test_entries_are_found_by_the_pages_of_the_dead(first):
    made = copies("memory")
    protector = Protector.of(made.fresh(0))
    assert protector is not None
    protector.copy(np.array([8, 9, 10, 11, 4]), AT, AT, ROWS)  # pages 2 and 1 of four entries
    tokens, path = AT[first:].astype(np.int32), made._of[0].copy.path
    fields = {"pages": [0, 3], "from_pages": [2, 1], "first": first, "count": 5 - first, "cache_copy": path}
    command = link_pb2.RestoreCache(**fields, tokens=tokens.tobytes())
    assert restored_rows(command, 4).view(np.float32).tolist() == ROWS[first:].reshape(5 - first, -1).tolist()
    command.tokens = (tokens + 1).tobytes()
    with pytest.raises(NotCopied):
        restored_rows(command, 4)
    made.close()
