"""Ranks that Ray starts, on a local cluster of several nodes, one of which dies: Ray finds another node, and no stream
notices."""

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest

from serving.api.client import Client
from serving.server import Server
from tests.e2e.conftest import FEW_BUCKETS, TINY
from tests.support.joining import free_address
from tests.support.streams import Traffic, events_since, last_event, wait_until_whole

NODES = ("ash", "beech", "chestnut")


@pytest.fixture(scope="module")
def nodes() -> Iterator[tuple["_Cluster", dict[str, Any]]]:
    """A cluster whose nodes have room for one rank each: its head, and the others by label."""
    utils = pytest.importorskip("ray.cluster_utils", reason="needs moejax[ray]")
    with contextlib.closing(_Cluster(_started(utils))) as cluster:
        yield cluster, {name: cluster.add(name) for name in NODES}


def _started(utils: Any) -> Any:
    """A cluster of a head alone. Ray gives a node half a minute to start, which a busy machine may not have."""
    head = {"num_cpus": 0, "include_dashboard": False, "object_store_memory": 80 << 20}
    for attempt in range(3):
        try:
            return utils.Cluster(initialize_head=True, head_node_args=head)
        except Exception as error:
            if attempt == 2 or "timed out during startup" not in str(error):
                raise
    raise AssertionError("unreachable: the last attempt returns or raises")


class _Cluster:
    def __init__(self, cluster: Any) -> None:
        self.cluster = cluster

    def add(self, name: str) -> Any:
        """A node whose label is the host that its rank says it is on."""
        labels = {"moejax.dev/host": name, "moejax.dev/rack": "grove"}
        return self.cluster.add_node(num_cpus=1, labels=labels, object_store_memory=80 << 20)

    def remove(self, node: Any) -> None:
        """Have a node die."""
        self.cluster.remove_node(node, allow_graceful=False)

    def close(self) -> None:
        self.cluster.shutdown()


@pytest.mark.slow  # a cluster of Ray alone takes half a minute to start
@pytest.mark.parametrize("arch", [{}, {"arch": "pd", "prefill": 1, "decode": 1}], ids=["collocated", "pd"])
def test_when_a_node_dies_ray_starts_its_rank_on_another_and_no_token_changes(
    nodes: tuple["_Cluster", dict[str, Any]], arch: dict[str, Any]
) -> None:
    cluster, by_name = nodes
    for name in set(NODES) - by_name.keys():
        by_name[name] = cluster.add(name)
    address = cluster.cluster.address
    settings: dict[str, Any] = {"launcher": "ray", "ray_address": address, "rank_listen": free_address(), **arch}
    with Server(model=str(TINY), ranks=2, buckets=FEW_BUCKETS, **settings) as server, Client(server) as client:
        wait_until_whole(client)
        hosts = [rank.host for rank in client.status().ranks]
        (spare,) = set(NODES) - set(hosts)
        traffic = Traffic.record(client, streams=4, prompt_tokens=40, max_tokens=60)
        before = last_event(client)
        traffic.during(client, lambda: cluster.remove(by_name.pop(hosts[1])))
        assert [event.rank for event in events_since(client, before) if event.kind == "rank_lost"] == [1]
        wait_until_whole(client)
        assert [rank.host for rank in client.status().ranks] == [hosts[0], spare]
        traffic.during(client)
