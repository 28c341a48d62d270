"""The Grafana dashboard asks only for what is exported."""

import json
import re
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from deploy.grafana import PANELS, dashboard
from serving.generation import Generation
from serving.metrics import Metrics
from serving.request import SamplingParams
from tests.fake_backend import FakeBackend
from tests.fake_tokens import byte_tokenizer

FILE = Path(__file__).resolve().parents[2] / "deploy" / "grafana-dashboard.json"


def test_the_file_is_what_the_generator_writes():
    assert json.loads(FILE.read_text()) == dashboard()


@pytest.mark.anyio
async def test_every_name_in_a_panel_is_exported():
    backend = FakeBackend()
    metrics = Metrics(backend)
    generation = Generation(backend, byte_tokenizer(), metrics)
    _ = [item async for item in generation.stream(await generation.accept("a", SamplingParams(max_tokens=2)))]
    await backend.lose(1)
    metrics._heard(backend._events[-1])
    exported = {
        sample.name for family in text_string_to_metric_families(metrics.render().decode()) for sample in family.samples
    }
    asked = {
        name
        for _, _, series in PANELS
        for _, query in series
        for name in re.findall(r"\b(?:vllm:|moejax_)[a-z0-9_]+", query)
    }
    assert len(asked) > 20
    assert asked <= exported
