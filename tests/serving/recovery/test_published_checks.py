"""A published model is refused by its config.json, before it is converted, where its layers do not allow a setting."""

import json
import shutil
from pathlib import Path

import pytest

from planner.inputs.published import MODELS
from serving.app import App
from serving.config import Settings
from serving.errors import InvalidRequest
from serving.recovery.published_checks import check_published

DRAFTS = {"speculate": "ngram"}
MTP = {"speculate": "mtp"}
ROLES = {"arch": "disaggregated"}


def published(folder: Path, name: str) -> str:
    """A published folder that has a configuration and nothing else."""
    folder.mkdir()
    shutil.copy(MODELS / f"{name}.json", folder / "config.json")
    return str(folder)


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("name", "given", "error"),
    [
        ("qwen3-next-80b-a3b", DRAFTS, "speculate is ngram, and model has layers whose context is a state"),
        ("qwen3-next-80b-a3b", ROLES, "model has layers whose context is a state, which attention ranks"),
        ("lfm2-8b-a1b", DRAFTS, "speculate is ngram, and model has layers whose context is a state"),
        ("lfm2-8b-a1b", ROLES, "model has layers whose context is a state, which attention ranks"),
        ("qwen3-8b", ROLES, "model has no experts"),
        ("qwen3-next-80b-a3b", MTP, "speculate is mtp, and model has layers whose context is a state"),
        ("qwen3-8b", MTP, r"names 0 layers of multi-token prediction .* Set speculate to ngram, which drafts for"),
        ("deepseek-v3.2", MTP, "model_type 'deepseek_v32' is not served yet. Set speculate to ngram"),
    ],
)
async def test_a_setting_that_the_layers_do_not_allow_is_refused_before_anything_is_read(tmp_path, name, given, error):
    model = published(tmp_path / "model", name)
    with pytest.raises(InvalidRequest, match=error) as caught:
        await App.start(Settings(model=model, **given))
    assert caught.value.param in given


@pytest.mark.parametrize("given", [DRAFTS, ROLES])
def test_others_pass(tmp_path, given):
    check_published(Settings(model=published(tmp_path / "mixtral", "mixtral-8x7b"), **given))
    check_published(Settings(model="tiny", **given))
    broken = tmp_path / "broken"
    broken.mkdir()
    for text in ("no JSON", json.dumps({"model_type": "unknown"}), json.dumps({"name": "ours"})):
        (broken / "config.json").write_text(text)
        check_published(Settings(model=str(broken), **given))
