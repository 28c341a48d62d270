"""New weights are those of the served model, or the first difference is named with both values."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest

from moejax.checkpoint.manifest import CheckpointError
from moejax.config.config_values import ConfigError
from moejax.tools.same_model import check_same_config, check_same_dtypes, check_same_model, unused_files
from tests.support.models import MIXTRAL, model_folder

TOKENIZER = Path(__file__).parents[3] / "models" / "tiny" / "tokenizer.json"


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served") / "m"
    model_folder(folder, MIXTRAL)
    return folder


def test_other_weights_of_the_same_model_pass(served: Path, tmp_path: Path) -> None:
    model_folder(tmp_path / "m", dataclasses.replace(MIXTRAL, name="step-200"), seed=3)
    check_same_model(tmp_path / "m", served, sharded=False)
    check_same_dtypes(tmp_path / "m", served)
    check_same_config(dataclasses.replace(MIXTRAL, weights="int8"), MIXTRAL)
    assert unused_files(tmp_path / "m", served) == ()


@pytest.mark.parametrize(
    ("field", "value"), [("rope_base", 5e5), ("max_context", 8), ("stop_tokens", (1, 2)), ("vocab_size", 7)]
)
def test_another_configuration_is_refused_with_both_values(field, value) -> None:
    other = dataclasses.replace(MIXTRAL, **{field: value})
    with pytest.raises(ConfigError) as refusal:
        check_same_config(other, MIXTRAL)
    assert f"{field} is {value}, and that of the served model is {getattr(MIXTRAL, field)}." in str(refusal.value)


def test_another_vocabulary_is_refused_and_other_settings_of_the_tokenizer_are_not(
    served: Path, tmp_path: Path
) -> None:
    ours, other = tmp_path / "ours", tmp_path / "m"
    for folder in (ours, other):
        shutil.copytree(served, folder)
        shutil.copyfile(TOKENIZER, folder / "tokenizer.json")
    tokenizer = json.loads(TOKENIZER.read_text())
    (other / "tokenizer.json").write_text(json.dumps(tokenizer | {"truncation": {"max_length": 5}}))
    check_same_model(other, ours, sharded=False)
    words = tokenizer["model"]["vocab"]
    (other / "tokenizer.json").write_text(
        json.dumps(tokenizer | {"model": tokenizer["model"] | {"vocab": {**words, "new": len(words)}}})
    )
    with pytest.raises(CheckpointError, match=r"the vocabulary of .* is not that of the served model"):
        check_same_model(other, ours, sharded=False)


def test_another_number_format_is_refused_by_tensor(served: Path, tmp_path: Path) -> None:
    other = tmp_path / "m"
    shutil.copytree(served, other)
    sums = json.loads((other / "checksums.json").read_text())
    name = sorted(sums)[0]
    sums[name]["dtype"] = "bfloat16"
    (other / "checksums.json").write_text(json.dumps(sums))
    with pytest.raises(CheckpointError, match=f"tensor {name} is stored as bfloat16, and that of .* as float32"):
        check_same_dtypes(other, served)


def test_a_folder_that_is_not_there_is_named(served: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere is no folder on this machine"):
        check_same_model(tmp_path / "nowhere", served, sharded=False)


def test_files_that_say_how_the_model_is_talked_to_and_differ_are_named(served: Path, tmp_path: Path) -> None:
    other = tmp_path / "m"
    shutil.copytree(served, other)
    template = (served / "chat_template.jinja").read_text()
    (other / "chat_template.jinja").write_text(f"\ufeff{template}\n")
    assert unused_files(other, served) == ()
    (other / "chat_template.jinja").write_text(f"{template}!")
    (other / "generation_config.json").write_text('{"temperature": 0.3}')
    (other / "additional_chat_templates").mkdir()
    (other / "additional_chat_templates" / "rag.jinja").write_text("x")
    named = ("additional_chat_templates/rag.jinja", "chat_template.jinja", "generation_config.json")
    assert unused_files(other, served) == unused_files(served, other) == named
