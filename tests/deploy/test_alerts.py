"""The alert rules ask only for what is exported, and have the form that Prometheus reads."""

import re
from pathlib import Path

import pytest
import yaml

from tests.support.exported_metrics import exported_samples

FILE = Path(__file__).parents[2] / "deploy" / "alerts.yaml"
RULES = [rule for group in yaml.safe_load(FILE.read_text())["groups"] for rule in group["rules"]]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule["alert"])
def test_a_rule_has_what_prometheus_wants(rule):
    assert rule.keys() <= {"alert", "expr", "for", "labels", "annotations"}
    assert re.fullmatch(r"Moejax\w+", rule["alert"])
    assert rule["labels"]["severity"] in ("page", "ticket")
    assert rule["annotations"].keys() == {"summary", "description"}
    assert rule["expr"].count("(") == rule["expr"].count(")")
    assert re.fullmatch(r"\d+[smh]", rule.get("for", "1m"))


@pytest.mark.anyio
async def test_every_name_in_a_rule_is_exported():
    asked = {name for rule in RULES for name in re.findall(r"\b(?:vllm:|moejax_)[a-z0-9_]+", rule["expr"])}
    assert len(asked) > 10
    assert asked <= await exported_samples()


def test_alerts_have_names_of_their_own():
    names = [rule["alert"] for rule in RULES]
    assert len(set(names)) == len(names)
