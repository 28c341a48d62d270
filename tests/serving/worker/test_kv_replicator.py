"""A rank copies its cache to shared memory where it can, and makes messages for the front otherwise."""

import os

import numpy as np
import pytest

from serving.executor.kv_replica import NotReplicated
from serving.proto.moejax.v1 import link_pb2
from serving.recovery.kv_replicas import KVReplicas
from serving.worker.kv_replicator import MESSAGE_BYTES, KVReplicator, restored_rows

AT = np.arange(5)
ROWS = np.arange(5 * 2 * 3, dtype=np.float32).reshape(5, 2, 3)
"""Five entries of two layers."""


def copies(way: str) -> KVReplicas:
    return KVReplicas.create(way, 1, entries=16, entry_bytes=24)


def test_a_rank_that_may_not_open_its_replica_sends_messages_and_restores_entries_from_one():
    made = copies("memory")
    command = made.assign(0)
    assert made.can_map(0)
    command.cache_copy = f"/proc/{os.getpid()}/fd/99999"
    replicator = KVReplicator.of(command)
    assert replicator is not None
    replicator.copy(AT + 3, AT, AT, ROWS)
    replicator.seal(7)
    for message in replicator.take_messages():
        made.receive(0, message)
    assert not made.can_map(0)
    assert replicator.take_messages() == []
    made.retire(0)
    kept = made.replica(1)
    assert kept is not None
    assert kept.replica.sealed == 7
    assert kept.replica.read(AT + 3, AT, AT).view(np.float32).tolist() == ROWS.reshape(5, -1).tolist()
    made.close()


def test_rows_too_large_for_one_message_are_sent_in_several_and_sealed_by_the_last():
    replicator = KVReplicator.of(link_pb2.Configure(tell_copies=True))
    assert replicator is not None
    rows = np.zeros((3, 1, MESSAGE_BYTES // 8 + 1), np.float32)
    replicator.copy(AT[:3], AT[:3], AT[:3], rows)
    replicator.seal(1)
    messages = replicator.take_messages()
    assert [len(message.entries) // 4 for message in messages] == [1, 1, 1, 0]
    assert [message.HasField("sealed") for message in messages] == [False, False, False, True]


@pytest.mark.parametrize("first", [0, 2])
def test_entries_are_found_by_the_pages_of_the_dead(first):
    made = copies("memory")
    replicator = KVReplicator.of(made.assign(0))
    assert replicator is not None
    replicator.copy(np.array([8, 9, 10, 11, 4]), AT, AT, ROWS)  # pages 2 and 1 of four entries
    tokens, path = AT[first:].astype(np.int32), made._live[0].replica.path
    fields = {"pages": [0, 3], "from_pages": [2, 1], "first": first, "count": 5 - first, "cache_copy": path}
    command = link_pb2.RestoreCache(**fields, tokens=tokens.tobytes())
    assert restored_rows(command, 4).view(np.float32).tolist() == ROWS[first:].reshape(5 - first, -1).tolist()
    command.tokens = (tokens + 1).tobytes()
    with pytest.raises(NotReplicated):
        restored_rows(command, 4)
    made.close()
