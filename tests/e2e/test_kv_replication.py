"""KV replicas of real ranks: the entries of a dead rank are restored bit for bit, in any format of the cache, not
computed again."""

import pytest

from serving.api.client import Client
from serving.server import Server
from tests.e2e.conftest import FEW_BUCKETS, PAIR, TINY
from tests.support.streams import Traffic, events_since, kill, last_event, wait_until_whole

SETTINGS = {"model": str(TINY), "buckets": FEW_BUCKETS, "prefix_caching": False, "chaos": True}
LONG = {"streams": 8, "prompt_tokens": 380, "max_tokens": 60}
"""Contexts that take a dozen tiles to compute: a copy is quicker on any machine."""
TOKEN_BYTES = 4 * 2 * (64 + 2 * 4)
"""Of the tiny model's four layers: keys and values of two heads of 32 numbers, a byte each, and their scales."""


@pytest.mark.parametrize(("way", "form"), [("memory", "int8"), ("stream", "fp8")])
def test_the_contexts_of_ranks_killed_in_decode_are_restored_and_no_token_changes(way: str, form: str) -> None:
    settings = {"lattice_depth": 1, "ranks": 3, "kv_replication": way, "kv_cache_type": form, **SETTINGS}
    with Server(**settings) as server, Client(server) as client:
        traffic = Traffic.record(client, **LONG)
        for victim in (0, 2):
            wait_until_whole(client)
            before = client.status()
            since = last_event(client)
            traffic.during(client, kill(client, victim), after=0.3)
            after = client.status()
            assert after.protection == way
            assert (after.kv_cache_type, after.kv_token_bytes) == (form, TOKEN_BYTES)
            assert after.protected_bytes > 0
            restored = after.tokens_restored - before.tokens_restored
            assert restored > LONG["prompt_tokens"]
            events = {event.kind: event for event in events_since(client, since)}
            assert "not_restored" not in events
            assert "entries to restore" in events["recovered"].message
            assert events["cache_restored"].phases["restore"] > 0


def test_a_context_is_restored_though_no_rank_is_left() -> None:
    with Server(kv_replication="memory", **SETTINGS | PAIR) as server, Client(server) as client:
        traffic = Traffic.record(client, streams=4, prompt_tokens=380, max_tokens=60)
        traffic.during(client, kill(client, 0), kill(client, 1), after=0.3)
        assert client.status().tokens_restored > 380
