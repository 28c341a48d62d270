"""Laws of the band: it holds its figure, is wider where nothing was measured, and says why."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

import planner.cost.band
from planner import Cluster, InputError
from planner.cli.main import main
from planner.cost.band import BEYOND, FEW, UNCHECKED, Band, band_of
from planner.inputs.cluster import read_cluster
from planner.inputs.engine import engine_names, engine_of, read_profile
from planner.inputs.published import read_model
from planner.plan.shape import Shape


def shape(ranks: int, slots: int = 1) -> Shape:
    roles = ("collocated",) * ranks
    return Shape(arch="collocated", tensor=1, dense=1, slots=slots, roles=roles, groups=tuple(range(ranks)))


def test_a_setting_like_those_measured_has_their_error():
    model = read_model("qwen3-235b-a22b")
    band = band_of(model, read_cluster("h200"), shape(8, 16), 16, 1024)
    assert not band.beyond
    assert 1.0 < band.tpot < BEYOND
    assert f"n = {band.count}]" in band.source()


@pytest.mark.parametrize(
    ("cluster", "count", "requests", "prompt", "why"),
    [
        ("h200:4x8", 32, 16, 1024, "32 devices"),
        ("h200", 8, 4000, 1024, "4,000 requests"),
        ("h200", 8, 16, 100_000, "prompts of 100,000"),
        ("gb300:1x4", 4, 16, 1024, "chip gb300"),
        ("v5e", 8, 16, 1024, "engine jax on v5e"),
    ],
)
def test_what_was_not_measured_says_so(cluster, count, requests, prompt, why):
    band = band_of(read_model("qwen3-235b-a22b"), read_cluster(cluster), shape(count, 16), requests, prompt)
    assert why in band.beyond
    assert band.tpot >= BEYOND
    assert "outside of what was measured" in band.source()


def test_a_model_far_smaller_than_those_measured_says_so():
    cluster, alone = read_cluster("h100:1x1"), shape(1)
    small, measured = (band_of(read_model(name), cluster, alone, 8, 1024) for name in ("qwen3-0.6b", "llama-3.1-8b"))
    assert "GB of weights, measured from 9.1" in small.beyond
    assert small.tpot >= BEYOND
    assert not measured.beyond


def test_models_with_the_matrices_of_a_measured_one_have_its_error():
    cluster = read_cluster("b300:1x8")
    first, second = (band_of(read_model(name), cluster, shape(8, 48), 16, 1024) for name in ("kimi-k2", "kimi-k2.5"))
    assert "of this kind" in first.source()
    assert (first.tpot, first.count) == (second.tpot, second.count)
    assert "of this kind" in band_of(read_model("minimax-m2.5"), cluster, shape(8, 32), 16, 1024).source()


def test_drafts_other_formats_and_other_models_say_so():
    model = read_model("qwen3-235b-a22b")
    for changed, why in (
        (model.with_drafts(1, 0.8), "drafted tokens"),
        (replace(model, weight_format="int8"), "int8 weights"),
    ):
        assert why in band_of(changed, read_cluster("h200"), shape(8, 16), 16, 1024).beyond
    other = band_of(read_model("mixtral-8x7b"), read_cluster("h200"), shape(8, 2), 16, 1024)
    assert not other.beyond
    assert "of other models on this chip" in other.source()


def test_few_settings_of_a_model_say_that_the_error_is_of_others(monkeypatch):
    model, cluster = read_model("qwen3-235b-a22b"), read_cluster("h200")
    engine, checked = read_profile(engine_of(cluster.hardware).name)
    name = f"{cluster.hardware.name} {model.name}"
    for count in (FEW - 1, FEW):
        kinds = {**checked["kinds"], name: {**checked["kinds"][name], "count": count}}
        monkeypatch.setattr(planner.cost.band, "read_profile", lambda _, k=kinds: (engine, {**checked, "kinds": k}))
        found = band_of(model, cluster, shape(8, 16), 16, 1024)
        assert found.others == found.to_dict()["of_other_models"] == (count < FEW)
        assert (found.count == count) == ("of this kind" in found.source()) == (count >= FEW)


def test_the_ends_are_the_figure_divided_and_multiplied():
    band = Band(tpot=1.2, ttft=1.5, rate=1.1, count=106)
    assert band.around(21.6, "tpot") == {"low": pytest.approx(18), "mid": 21.6, "high": pytest.approx(25.92)}
    assert band.text(21.6, "tpot", "ms") == "18.0-25.9 ms"


def test_solve_prints_the_band_and_its_json_has_low_mid_high(capsys):
    argv = ["solve", "qwen3-235b-a22b", "h200", "--weights", "fp8"]
    assert main(argv) == 0
    shown = " ".join(capsys.readouterr().out.split())  # lines may be wrapped
    assert "a token every" in shown
    assert "[measured settings of this kind: error factor" in shown
    assert main([*argv, "--json"]) == 0
    best = json.loads(capsys.readouterr().out)["candidates"][0]
    for figure in best["ranges"].values():
        assert figure["low"] < figure["mid"] < figure["high"]
    assert best["ranges"]["tokens_per_second"]["mid"] == best["tokens_per_second"]
    assert main([*argv, "--engine", "jax"]) == 0
    assert f"error factor {UNCHECKED:.2g} assumed" in " ".join(capsys.readouterr().out.split())  # lines may be wrapped


def test_every_engine_has_constants_and_others_are_refused():
    hardware = read_cluster("h100").hardware
    for name in engine_names():
        assert engine_of(replace(hardware, engine=name)).name == name
    with pytest.raises(InputError, match="no engine with constants"):
        engine_of(replace(hardware, engine="steam"))
    variant, profile = read_profile("vllm")[0], read_profile("cuda-graph")[0]
    assert replace(variant, name=profile.name, prompt_kernel=profile.prompt_kernel) == profile


def test_a_cluster_of_no_known_chip_has_the_error_of_all():
    known = read_cluster("h200")
    cluster = Cluster.regular("ours", 1, 8, hardware=replace(known.hardware, name="ours"))
    assert "chip ours" in band_of(read_model("qwen3-235b-a22b"), cluster, shape(8, 16), 16, 1024).beyond
