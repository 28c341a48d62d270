"""A table of measured settings as others write it: models and chips by their names, absent columns, broken values."""

from __future__ import annotations

import csv

import pytest

from planner.cli.main import main
from planner.cost.measured_models import SAME, SIZES, engine_name, find_chip, find_measured, measured_name
from planner.cost.measured_row import NEEDED
from planner.cost.measurements import read_measurements
from planner.errors import InputError
from planner.inputs.published import MODELS, count_parameters

GOOD = {
    "backend": "vllm",
    "model_path": "Qwen/Qwen3-235B-A22B-FP8",
    "system": "h200_sxm",
    "precision": "fp8",
    "isl": "1024",
    "osl": "1024",
    "batch_size": "16",
    "tp_size": "8",
    "silicon_ttft_ms": "200",
    "silicon_tpot_ms": "15",
}


def written(path, *rows: dict[str, str]) -> str:
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return str(path)


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("deepseek-ai/DeepSeek-R1", "deepseek-v3"),
        ("nvidia/DeepSeek-V3.1-NVFP4", "deepseek-v3"),
        ("deepseek-ai/DeepSeek-V3.2-Exp", "deepseek-v3.2"),
        ("deepseek-ai/DeepSeek-R1-Distill-Llama-70B", "llama-3.1-70b"),
        ("meta-llama/Meta-Llama-3-8B-Instruct", "llama-3.1-8b"),
        ("meta-llama/Llama-3.3-70B-Instruct", "llama-3.1-70b"),
        ("zai-org/GLM-4.5-Air-FP8", "glm-4.5-air"),
        ("zai-org/GLM-4.6", "glm-4.5"),
        ("moonshotai/Kimi-K2.5", "kimi-k2"),
        ("MiniMaxAI/MiniMax-M2", "minimax-m2.5"),
        ("Qwen/Qwen3-30B-A3B-Instruct-2507", "qwen3-30b-a3b"),
        ("Qwen/Qwen3-14B", "qwen3-14b"),
        ("openai/gpt-oss-20b", "gpt-oss-20b"),
    ],
)
def test_a_path_names_the_configuration_of_its_model(path, name):
    found = find_measured(path)
    assert found is not None
    assert found[0] == name


@pytest.mark.parametrize("path", ["google/gemma-3-27b-it", "deepseek-ai/DeepSeek-R1-Distill-Phi-4", "acme/qwen3-8bit"])
def test_a_model_that_is_not_known_is_not_taken_for_another(path):
    assert find_measured(path) is None


def test_sizes_are_those_of_the_models_that_they_name():
    published = {"qwen3-4b": 4.02, "qwen3-14b": 14.77, "qwen2.5-14b": 14.77, "qwen2.5-32b": 32.76, "qwen2.5-72b": 72.71}
    assert set(published) == set(SIZES)
    for name, billions in published.items():
        found = find_measured(name)
        assert found is not None
        assert count_parameters(found[1]).total / 1e9 == pytest.approx(billions, rel=2e-3)
    shipped = {p.stem for p in MODELS.glob("*.json")}
    assert {measured_name(name) for name in SAME} <= shipped | set(SIZES)


def test_systems_name_chips():
    names = {system: getattr(find_chip(system), "name", None) for system in ("h100_sxm", "NVIDIA H20", "tpu-v6e-8")}
    assert names == {"h100_sxm": "h100", "NVIDIA H20": "h20", "tpu-v6e-8": "v6e"}
    assert find_chip("h100_pcie") is None
    assert find_chip("abacus") is None


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("isl", "many", "must be a number"),
        ("isl", "0", "whole number of at least 1"),
        ("osl", "", "must be a number"),
        ("batch_size", "1.5", "whole number of at least 1"),
        ("tp_size", "-2", "whole number of at least 1"),
        ("silicon_tpot_ms", "-3", "milliseconds of at least 0"),
        ("silicon_ttft_ms", "nan", "must be a number"),
    ],
)
def test_a_broken_value_is_named_with_its_line_and_column(tmp_path, column, value, message):
    file = written(tmp_path / "data.csv", GOOD, GOOD | {column: value})
    with pytest.raises(
        InputError, match=rf"data\.csv, line 3: column {column} is '{value}', it must be .*{message[8:]}"
    ):
        read_measurements(file)


def test_columns_that_are_missing_are_all_named(tmp_path):
    short = {key: value for key, value in GOOD.items() if key not in ("isl", "silicon_tpot_ms")}
    with pytest.raises(
        InputError, match="has no columns isl, silicon_tpot_ms; a table of measured settings has backend"
    ):
        read_measurements(written(tmp_path / "data.csv", short))


def test_needed_columns_are_enough_and_what_is_not_expressed_is_counted(tmp_path):
    assert tuple(GOOD) == NEEDED
    others = [
        GOOD | {"silicon_tpot_ms": ""},
        GOOD | {"model_path": "acme/new", "precision": "fp3"},
        GOOD | {"model_path": "Qwen/Qwen3-32B", "precision": "fp3"},
    ]
    measured, left = read_measurements(written(tmp_path / "data.csv", GOOD, *others))
    assert [m.model for m in measured] == ["qwen3-235b-a22b"]
    assert left == {"no measured time per output token": 1, "model acme/new": 1, "precision fp3": 1}


def test_a_configuration_can_be_given_for_a_model_that_is_not_known(tmp_path, capsys):
    file = written(tmp_path / "data.csv", GOOD | {"model_path": "acme/new"})
    config = str(MODELS / "qwen3-235b-a22b.json")
    assert main(["accuracy", file, "--no-refit", "--config", f"acme/new={config}"]) == 0
    assert "model qwen3-235b-a22b" in capsys.readouterr().out
    assert main(["accuracy", file, "--config", "acme/new"]) == 2
    assert "is not NAME=FILE" in capsys.readouterr().err


def test_an_engine_has_one_name_however_it_is_spelled_and_an_empty_one_is_said(tmp_path, capsys):
    spelled = ["vllm", "VLLM", " vLLM ", "TRTLLM", "TensorRT-LLM", "trt_llm", "SGLang", "", "acme"]
    rows = [GOOD | {"backend": name, "batch_size": str(at + 1)} for at, name in enumerate(spelled)]
    rows += [GOOD | {"model_path": ""}, GOOD | {"system": " "}, GOOD | {"mode": "AGG", "batch_size": "99"}]
    rows = [{"mode": "agg", **row} for row in rows]
    file = written(tmp_path / "data.csv", *rows)
    measured, left = read_measurements(file)
    names = ["vllm"] * 3 + ["trtllm"] * 3 + ["sglang", "not given", "acme", engine_name(GOOD["backend"])]
    assert [m.engine for m in measured] == names
    assert left == {"model not given": 1, "chip not given": 1}
    assert main(["accuracy", file, "--no-refit"]) == 0
    shown = capsys.readouterr().out
    assert "engine not given" in shown
    assert all(line.split()[1:2] for line in shown.splitlines() if line.startswith(("model", "engine", "chip")))
