"""The Grafana dashboard asks only for what is exported."""

import json
import re
from pathlib import Path

import pytest

from deploy.grafana import PANELS, dashboard
from tests.support.exported_metrics import exported_samples

FILE = Path(__file__).parents[2] / "deploy" / "grafana-dashboard.json"


def test_the_file_is_what_the_generator_writes():
    assert json.loads(FILE.read_text()) == dashboard()


@pytest.mark.anyio
async def test_every_name_in_a_panel_is_exported():
    asked = {
        name
        for _, _, series in PANELS
        for _, query in series
        for name in re.findall(r"\b(?:vllm:|moejax_)[a-z0-9_]+", query)
    }
    assert len(asked) > 20
    assert asked <= await exported_samples()
