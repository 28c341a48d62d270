"""Metrics of the status are total: each field is exported, or a table says why it is not."""

import dataclasses
from typing import Any

from serving.observability.status_metrics import NOT_EXPORTED, StatusCollector
from serving.protocol.status import LossCost, RankStatus, Status
from tests.support.fake_backend import FakeBackend


class Reads:
    """A status value that notes which of its fields are read, in `seen`."""

    def __init__(self, value: Any, seen: dict[str, set[str]]) -> None:
        self._value = value
        self._seen = seen

    def __getattr__(self, name: str) -> Any:
        self._seen.setdefault(type(self._value).__name__, set()).add(name)
        value = getattr(self._value, name)
        if name == "ranks":
            return [Reads(rank, self._seen) for rank in value]
        return Reads(value, self._seen) if dataclasses.is_dataclass(value) else value


def test_every_field_of_the_status_is_exported_or_has_a_reason_not_to_be(monkeypatch):
    backend, seen = FakeBackend(), {}
    status = Reads(backend.status(), seen)
    monkeypatch.setattr(backend, "status", lambda: status)
    list(StatusCollector(backend).collect())
    for kind in (Status, RankStatus, LossCost):
        fields = {field.name for field in dataclasses.fields(kind)}
        reasons = NOT_EXPORTED[kind.__name__]
        assert fields - seen[kind.__name__] == reasons.keys()
        assert all(reasons.values())


def test_every_metric_of_the_status_has_a_help_text_of_one_sentence():
    for metric in StatusCollector(FakeBackend()).collect():
        assert metric.documentation[0].isupper() or metric.documentation[0].isdigit(), metric.name
        assert metric.documentation.endswith("."), metric.name


def test_ranks_that_share_the_stream_of_their_host_agent_are_counted_by_host():
    collector, status = StatusCollector(FakeBackend()), FakeBackend().status()
    agents = dict(zip((rank.id for rank in status.ranks), ("a", "b", "b"), strict=False))
    ranks = tuple(dataclasses.replace(rank, relay=agents.get(rank.id, "")) for rank in status.ranks)
    collector.status = dataclasses.replace(status, ranks=ranks)
    relayed = next(metric for metric in collector.collect() if metric.name == "moejax_relayed_ranks")
    assert {sample.labels["host"]: sample.value for sample in relayed.samples} == {"a": 1, "b": 2}
