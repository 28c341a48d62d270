"""Experts that no rank holds any more and no store can give come back from parity, on real processes."""

import shutil
from pathlib import Path

from serving.api.client import Client
from serving.server import Server
from tests.e2e.conftest import FEW_BUCKETS, TINY
from tests.support.streams import Traffic, events_since, wait_until


def wait_until_protected(client: Client) -> None:
    """All parity is made of the plan that the last loss left, and the next loss is prepared."""

    def made() -> bool:
        kinds = [event.kind for event in events_since(client, 0)]
        return "parity_ready" in kinds["recovered" in kinds and last(kinds, "recovered") :]

    wait_until(made, "the parity is made")
    wait_until(lambda: client.status().lattice["1 rank"] == 1.0, "the next loss is prepared")
    status = client.status()
    assert status.parity_groups == status.parity_wanted > 0


def last(kinds: list[str], kind: str) -> int:
    """Where this kind comes last."""
    return len(kinds) - 1 - kinds[::-1].index(kind)


def test_one_rank_after_the_other_dies_without_a_store_and_no_token_changes(tmp_path: Path) -> None:
    folder = tmp_path / "bare"
    shutil.copytree(TINY, folder)
    config = folder / "config.json"  # a name of its own, so that its host copy is not that of other servers
    config.write_text(config.read_text().replace('"name": "tiny"', '"name": "bare"'))
    settings = {"survive": 0, "slots_per_rank": 2, "parity": 3, "restart": False, "scrub_s": 2.0}
    settings |= {"buckets": FEW_BUCKETS}
    with Server(model=str(folder), ranks=4, chaos=True, **settings) as server, Client(server) as client:
        wait_until_protected(client)
        assert server.app is not None
        assert "bare" in str(server.app.failover.model.store)
        shutil.rmtree(server.app.failover.model.store)
        known = Traffic.record(client, streams=4, prompt_tokens=40, max_tokens=60)
        assert [loss.experts_loaded for loss in client.what_if() if loss.kind == "rank"] == [0] * 4
        left = 4
        for rank in (2, 0, 3):
            rebuilt = client.status().experts_rebuilt
            known.during(client, lambda rank=rank: client.kill(rank))
            left -= 1
            status = client.status()
            assert sum(each.state == "serving" for each in status.ranks) == left
            assert status.masked == ()
            assert status.experts_rebuilt > rebuilt
            assert status.compiles_after_ready == 0
            if left > 1:
                wait_until_protected(client)
        assert client.status().failed == client.status().degraded == 0
        kinds = {event.kind for event in events_since(client, 0)}
        assert {"parity_ready", "rebuilt", "recovered"} <= kinds
        assert kinds.isdisjoint({"masked", "store_unreadable", "rebuild_failed", "damaged"})
