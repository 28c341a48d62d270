"""Law: the report of a folder has every configuration under it: its figures, or the reason why it is not read."""

import json
from pathlib import Path

import pytest

from benchmarks.published import main, report
from planner.inputs.published import MODELS, count_parameters, find_published, published_model


def test_every_configuration_is_counted_or_has_its_reason(tmp_path: Path) -> None:
    for name in ("mixtral-8x7b", "kimi-k2.5"):
        (tmp_path / "deep" / name).mkdir(parents=True)
        (tmp_path / "deep" / name / "config.json").write_text(json.dumps(find_published(name)[1]))
    (tmp_path / "org--flat_config.json").write_text(json.dumps(find_published("olmoe-1b-7b")[1]))
    (tmp_path / "new_config.json").write_text(json.dumps({"model_type": "jamba"}))
    (tmp_path / "broken_config.json").write_text("{")
    (tmp_path / "tokenizer_config.json").write_text("{}")
    (tmp_path / "generation_config.json").write_text("{}")
    text = report(tmp_path, 1000)
    assert "3 of 5 configurations are read." in text
    rows = {line.split()[1]: line for line in text.splitlines() if len(line.split()) > 5}
    for name, shown in (("mixtral-8x7b", "deep/mixtral-8x7b"), ("olmoe-1b-7b", "org--flat_config")):
        counts = count_parameters(published_model(find_published(name)[1]))
        assert f"{counts.total:,}" in rows[shown]
        assert f"{counts.active:,}" in rows[shown]
    assert "int4" in rows["deep/kimi-k2.5"]
    assert "125 MiB" in rows["deep/mixtral-8x7b"], "131,072 bytes a token"
    assert "new_config: " in text
    assert "the decoder lacks Mamba layers, whose context" in text
    assert "is not JSON" in text


def test_the_shipped_configurations_are_all_read(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for path in MODELS.glob("*.json"):
        (tmp_path / path.stem).mkdir()
        (tmp_path / path.stem / "config.json").write_text(path.read_text())
    assert main(["--configs", str(tmp_path)]) == 0
    count = len(list(MODELS.glob("*.json")))
    assert count >= 40
    assert f"{count} of {count} configurations are read." in capsys.readouterr().out


def test_a_folder_without_configurations_is_an_error(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["--configs", str(tmp_path)]) == 1
    assert "has no config.json" in capsys.readouterr().out
