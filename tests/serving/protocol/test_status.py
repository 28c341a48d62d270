"""The dataclasses of `serving.protocol` are the source: every other place that repeats a status is total over them."""

import ast
import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest

from serving.proto.moejax.v1 import inference_pb2, resilience_pb2
from serving.protocol.events import Event
from serving.protocol.prepared_model import ModelInfo
from serving.protocol.status import LossCost, LossForecast, RankStatus, Status

SERVING = Path(__file__).parents[3] / "serving"

MESSAGES: dict[type, Any] = {
    Status: resilience_pb2.Status,
    RankStatus: resilience_pb2.Rank,
    LossCost: resilience_pb2.LossCost,
    LossForecast: resilience_pb2.Prospect,
    Event: resilience_pb2.Event,
    ModelInfo: inference_pb2.ModelInfo,
}
METRICS = "a metric; the page shows the state during a failure"
JSON = "in `moejax status --json` and in metrics; the table shows the state during a failure"
NOT_ON_THE_DASHBOARD = {
    Status: dict.fromkeys(
        (
            *(
                "generation",
                "steps",
                "step_ms",
                "rank_ms",
                "program_ms",
                "preemptions",
                "prefix_queries",
                "prefix_hits",
            ),
            *("started_at", "experts_loaded", "degraded", "restored", "journal", "protection", "protected_bytes"),
            *("experts_rebuilt", "parity_groups", "parity_wanted", "parity_bytes", "tokens_restored"),
            *("tokens_recomputed", "rows", "rows_filled", "weights_switches", "draft_passes_skipped"),
        ),
        METRICS,
    )
    | dict.fromkeys(
        ("page_size", "buckets", "front_pid", "operable", "speculate", "kv_cache_type", "kv_token_bytes"),
        "in `moejax status`",
    ),
    RankStatus: dict.fromkeys(("compiles", "slowness", "level"), METRICS),
}
NOT_IN_THE_TABLE = {
    Status: dict.fromkeys(
        (
            *("draining", "chaos", "tokens", "step_ms", "rank_ms", "program_ms", "preemptions", "prefix_queries"),
            *("prefix_hits", "started_at", "page_size", "expert_load", "paused", "operable", "degraded", "restored"),
            *("journal", "draft_passes_skipped"),
        ),
        JSON,
    ),
    RankStatus: dict.fromkeys(("compiles", "slowness", "level", "rack"), JSON)
    | {"loss": "`moejax what-if` has the cost of each loss"},
}


def names_of(kind: type) -> set[str]:
    return {field.name for field in dataclasses.fields(kind)}


@pytest.mark.parametrize("kind", MESSAGES, ids=lambda kind: kind.__name__)
def test_a_message_has_the_fields_of_its_dataclass(kind):
    assert {field.name for field in MESSAGES[kind].DESCRIPTOR.fields} == names_of(kind)


@pytest.mark.parametrize(("kind", "name"), [(Status, "now"), (RankStatus, "rank")])
def test_the_dashboard_shows_every_field_or_a_table_says_why_not(kind, name):
    text = (SERVING / "dashboard" / "dashboard.js").read_text()
    shown = set(re.findall(rf"\b(?:{name}|server)\.(\w+)", text)) & names_of(kind)
    assert names_of(kind) - shown == NOT_ON_THE_DASHBOARD[kind].keys()


@pytest.mark.parametrize(("kind", "name"), [(Status, "status"), (RankStatus, "rank")])
def test_the_table_of_the_command_line_shows_every_field_or_a_table_says_why_not(kind, name):
    tree = ast.parse((SERVING / "cli" / "tables.py").read_text())
    shown = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == name
    }
    assert names_of(kind) - shown == NOT_IN_THE_TABLE[kind].keys()
