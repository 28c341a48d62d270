"""What the front is told of a model's work is what the planner reads from its published configuration."""

import json

import pytest

from moejax.families import read_config
from moejax.prepare import flops
from planner.huggingface import MODELS, workload


@pytest.mark.parametrize("name", ["mixtral-8x7b", "qwen3-30b-a3b", "deepseek-v2-lite", "deepseek-v3", "llama-3.1-8b"])
def test_work_per_token_is_that_of_the_published_configuration(name: str) -> None:
    config = json.loads((MODELS / f"{name}.json").read_text())
    told, planned = flops(read_config(config, name=name)), workload(config)
    assert told["expert_flops"] == planned.expert_flops
    assert told["context_flops"] == planned.context_flops
    assert told["rest_flops"] == pytest.approx(planned.rest_flops, rel=1e-4)
