"""The description of a model is true, and a model whose weights are of another one is refused."""

import dataclasses
import json
import re

import ml_dtypes
import numpy as np
import pytest

from moejax.checkpoint.families import SERVED_FAMILIES, read_config
from moejax.checkpoint.manifest import CheckpointError
from moejax.tools.inspect import describe, families, main
from moejax.tools.prepare import prepare
from moejax.tools.resolve import ensure_model
from planner.inputs.published import FAMILIES, MODELS, NOT_READ, count_parameters, published_model
from tests.support.models import MIXTRAL, model_folder
from tests.support.published import published_folder


@pytest.mark.parametrize(
    "name", ["mixtral-8x7b", "mixtral-8x22b", "llama-3.1-8b", "mistral-7b-v0.3", "qwen2.5-7b", "qwen3-8b"]
)
def test_parameters_are_those_that_the_authors_publish(name):
    found = describe(str(MODELS / f"{name}.json"))
    counted = count_parameters(published_model(json.loads((MODELS / f"{name}.json").read_text())))
    assert found["name"] == name
    assert (found["parameters"], found["active_parameters"]) == (counted.total, counted.active)
    assert found["served_bytes"] == pytest.approx(4 * counted.total, rel=1e-6)


def test_a_published_folder_and_what_it_becomes_say_the_same(tmp_path, monkeypatch):
    monkeypatch.setenv("MOEJAX_CACHE", str(tmp_path / "cache"))
    tensors = published_folder(tmp_path / "hf", dtype=ml_dtypes.bfloat16)
    before = describe(str(tmp_path / "hf"))
    assert not (tmp_path / "cache").exists()
    assert before["weights"] == {
        "form": "safetensors",
        "tensors": len(tensors),
        "formats": ["bfloat16"],
        "bytes": sum(a.nbytes for a in tensors.values()),
    }
    assert before["tokenizer"] == {"files": ["tokenizer.json"], "chat_template": True}
    after = describe(str(ensure_model(tmp_path / "hf")))
    assert after["weights"]["form"] == "orbax"
    same = before.keys() - {"weights", "name"}
    assert {k: after[k] for k in same - {"config"}} == {k: before[k] for k in same - {"config"}}
    assert after["config"] == before["config"]


def test_weights_of_another_model_are_an_error(tmp_path, capsys):
    published_folder(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text()) | {"num_local_experts": 3}
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=r"gate\.weight has shape"):
        describe(str(tmp_path))
    assert main([str(tmp_path)]) == 1
    assert capsys.readouterr().err.startswith("moejax: ")


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_the_first_plan_holds_every_expert_and_survives_one_loss(ranks):
    found = describe("tiny", ranks)
    plan, experts = found["plan"], found["config"]["moe"]["experts"]
    assert plan["slots_per_rank"] * max(1, ranks - 1) >= experts
    assert plan["second_copies_per_layer"] == ranks * plan["slots_per_rank"] - experts
    rest = found["served_bytes"] - 4 * experts * found["expert_bytes"]
    assert plan["bytes_per_rank"] == rest + plan["bytes_of_experts_per_rank"]


def test_a_dense_model_has_a_plan_like_any_other_without_slots():
    found = describe(str(MODELS / "llama-3.1-8b.json"), 2)
    assert found["plan"]["slots_per_rank"] == found["plan"]["bytes_of_experts_per_rank"] == 0
    assert found["plan"]["bytes_per_rank"] == found["served_bytes"]


def test_bytes_are_those_of_the_form_in_which_ranks_hold_weights():
    plain, narrow, small = (describe("tiny", 4, form) for form in ("float32", "bfloat16", "int8"))
    assert plain["expert_bytes"] == 2 * narrow["expert_bytes"]
    for key in ("served_bytes", "expert_bytes"):
        assert plain[key] > narrow[key] > small[key] > plain[key] / 4
    assert small["plan"]["bytes_per_rank"] < narrow["plan"]["bytes_per_rank"] < plain["plan"]["bytes_per_rank"]
    assert small["config"]["weights"] == "int8"


@pytest.mark.parametrize(
    ("dtype", "expected"), [(np.float32, "float32"), (ml_dtypes.bfloat16, "bfloat16"), (np.float16, "float32")]
)
def test_published_is_the_format_that_the_server_would_take(tmp_path, monkeypatch, capfd, dtype, expected):
    monkeypatch.setenv("MOEJAX_CACHE", str(tmp_path / "cache"))
    published_folder(tmp_path / "hf", dtype=dtype)
    found = describe(str(tmp_path / "hf"), 2, "published")
    assert found["config"]["weights"] == expected == prepare(str(tmp_path / "hf"), "published")["weights"]
    said = capfd.readouterr().err
    assert found["note"] in said if found["note"] else "ranks hold" not in said
    config = describe(str(MODELS / "deepseek-v3.json"), 8, "published")
    assert (config["config"]["weights"], config["note"]) == ("fp8", "")  # of experts, as such models usually are
    assert config["served_bytes"] < 1.05 * config["parameters"]


def test_published_and_auto_of_our_own_folders(tmp_path, capfd):
    cfg = dataclasses.replace(MIXTRAL, weights="int8")
    model_folder(tmp_path / "m", cfg, np.float16)
    assert (
        describe(str(tmp_path / "m"))["config"]["weights"] == "int8" == prepare(str(tmp_path / "m"), "auto")["weights"]
    )
    assert "stored" not in capfd.readouterr().err
    found = describe(str(tmp_path / "m"), 2, "published")
    assert prepare(str(tmp_path / "m"), "published")["weights"] == found["config"]["weights"] == "float32"
    said = capfd.readouterr().err
    assert re.search(r"is stored in float16, \d+\.\d [KM]iB; ranks hold its weights in float32, ", said)
    assert said.strip().endswith(found["note"])
    assert describe("tiny", 2)["config"]["weights"] == "float32"


def test_every_family_is_listed_once_with_its_state():
    rows = families()
    assert sorted(row["model_type"] for row in rows) == sorted([*FAMILIES, *NOT_READ])
    assert {row["model_type"] for row in rows if row["state"] == "served"} == set(SERVED_FAMILIES)
    assert {row["model_type"]: row["reason"] for row in rows if row["state"] != "served"} == {
        kind: f"the decoder lacks {reason}" for kind, reason in NOT_READ.items()
    }
    assert all(row["architectures"] for row in rows if row["state"] != "not yet")


def test_the_text_has_the_figures(tmp_path, capsys):
    published_folder(tmp_path / "small")
    assert main([str(tmp_path / "small"), "--ranks", "2"]) == 0
    text = capsys.readouterr().out
    for part in (
        "small (mixtral)",
        "3 moe",
        "4 per layer, 2 per token, 18.0 KiB each",
        "384 B per token",
        "on 2 ranks",
    ):
        assert part in text
    assert main(["--families"]) == 0
    assert "MixtralForCausalLM" in capsys.readouterr().out
    assert main([str(tmp_path / "small"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["config"]["vocab_size"] == read_config(tmp_path / "small").vocab_size
