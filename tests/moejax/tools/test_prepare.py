"""The work of a prepared model is what the planner reads from its published configuration."""

import json
from pathlib import Path

import pytest

from moejax.checkpoint.download import cache_folder
from moejax.checkpoint.families import read_config
from moejax.config.config_values import ConfigError
from moejax.tools.prepare import flops, prepare
from planner.inputs.published import MODELS, workload_from
from tests.support.published import published_folder


@pytest.mark.parametrize("name", ["mixtral-8x7b", "qwen3-30b-a3b", "deepseek-v2-lite", "deepseek-v3", "llama-3.1-8b"])
def test_work_per_token_is_that_of_the_published_configuration(name: str) -> None:
    config = json.loads((MODELS / f"{name}.json").read_text())
    told, planned = flops(read_config(config, name=name)), workload_from(config)
    assert told["expert_flops"] == planned.expert_flops
    assert told["context_flops"] == planned.context_flops
    assert told["rest_flops"] == pytest.approx(planned.rest_flops, rel=1e-4)


def test_heads_that_cannot_be_sharded_are_refused_before_anything_is_converted(tmp_path: Path) -> None:
    folder = tmp_path / "never-converted"
    published_folder(folder)
    with pytest.raises(ConfigError, match="2 key/value heads of never-converted cannot be sharded over 3 ranks"):
        prepare(str(folder), "float32", "replicated", "3")
    assert not list((cache_folder() / "models").glob("never-converted-*"))
