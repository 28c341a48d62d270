"""Laws of the fit: the constants behind made-up figures are found again, and predictions are those of the planner."""

from __future__ import annotations

import csv
from dataclasses import replace

import numpy as np
import pytest

from planner.cost.engine_fit import EXPECTED, FITTED, fit_engine, fit_variants, predict, settings_of
from planner.cost.measured_row import COLUMNS
from planner.cost.measurements import read_measurements
from planner.cost.roofline import first_token_time, prefill_time, step_time
from planner.cost.throughput import token_gap
from planner.errors import InputError
from planner.inputs.engine import engine_of

MODELS = {"deepseek-ai/DeepSeek-R1": "fp8", "openai/gpt-oss-120b": "fp4", "meta-llama/Llama-3.1-70B": "fp8"}


def rows() -> list[dict[str, str]]:
    """Settings of three models on H200s, at several widths, lengths and concurrencies; times are placeholders."""
    found = []
    for model, precision in MODELS.items():
        for width in (8,) if "DeepSeek" in model else (2, 4, 8):
            for batch in (1, 4, 16, 64, 128):
                for prompt in (1024, 8192):
                    row = dict.fromkeys(COLUMNS, "")
                    row |= {"backend": "vllm", "model_path": model, "system": "h200_sxm", "precision": precision}
                    row |= {"mode": "agg", "isl": str(prompt), "osl": "1024", "batch_size": str(batch)}
                    row |= {"tp_size": str(width), "attention_dp_size": "1", "moe_tp_size": str(width)}
                    row |= {"moe_ep_size": "1", "silicon_ttft_ms": "100", "silicon_tpot_ms": f"{10 + len(found)}"}
                    found.append(row)
    return found


def write(path, found: list[dict[str, str]]) -> str:
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(found)
    return str(path)


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    return read_measurements(write(tmp_path_factory.mktemp("data") / "data.csv", rows()))[0]


def test_the_constants_behind_the_figures_are_found_again(measured):
    s = settings_of(measured)
    true = replace(EXPECTED, weights=0.6, step=2e-3, request=4e-5, kernel=7e-6, prompt_kernel=9e-5)
    made = predict(s, true)
    found = fit_engine(replace(s, tpot=made.tpot, ttft=made.ttft))
    again = predict(s, found)
    assert np.abs(np.log(again.tpot / made.tpot)).max() < 0.1
    assert found.weights == pytest.approx(0.6, rel=0.1)
    assert found.kernel == pytest.approx(7e-6, rel=0.2)
    assert fit_variants(replace(s, ttft=made.ttft), true)["vllm"]["prompt_kernel"] == pytest.approx(9e-5)


def test_what_is_not_fitted_stays_as_assumed(measured):
    found = fit_engine(settings_of(measured))
    for name in ("products", "context", "narrow", "links", "interference"):
        assert name not in FITTED
        assert getattr(found, name) == getattr(EXPECTED, name)


def test_predictions_for_the_table_are_those_of_the_planner(measured):
    m = measured[-1]
    engine = engine_of(m.cluster.hardware)
    found = predict(settings_of([m]), engine)
    step = step_time(m.workload, m.cluster, m.shape, m.running, m.traffic.context).total
    prefill = prefill_time(m.workload, m.cluster, m.shape, m.traffic.prompt)
    gap = token_gap(step, prefill, m.running, m.traffic.output, engine)
    assert found.tpot[0] == pytest.approx(gap)
    assert found.ttft[0] == pytest.approx(first_token_time(m.workload, m.cluster, prefill, step))


def test_rows_that_the_planner_does_not_express_are_counted_with_the_reason(tmp_path):
    good = rows()[-1]
    other = [
        good,
        good | {"mode": "disagg"},
        good | {"model_path": "acme/unheard"},
        good | {"system": "abacus"},
        good | {"tp_size": "16", "moe_tp_size": "16"},
        good | {"batch_size": "512", "silicon_tpot_ms": "4.5"},
        good | {"batch_size": "8", "silicon_data_source": "silicon_concurrency=64"},
        good | {"silicon_data_source": "elsewhere"},
        good | {"silicon_data_source": "gtl_job_id=1"},
    ]
    measured, left = read_measurements(write(tmp_path / "data.csv", other))
    assert len(measured) == 1
    assert sum(left.values()) == len(other) - 1
    assert left["the same measurement again"] == 1
    assert left["chip abacus"] == left["model acme/unheard"] == 1


@pytest.mark.parametrize(
    ("source", "prompt", "batch", "cached"),
    [
        ("x/aic-auto-gap-analysis/y.csv; silicon_concurrency=64", "2000", "64", 1 - 10 / 64),
        ("x/aic-auto-gap-analysis/y.csv; silicon_concurrency=8", "2000", "8", 0.0),
        ("x/aic-auto-gap-analysis/y.csv; silicon_concurrency=64", "2048", "64", 0.0),
        ("x/aic-auto-gap-analysis/y.csv; gtl_job_id=1; silicon_concurrency=64", "2000", "64", 0.0),
        ("elsewhere; silicon_concurrency=64", "2000", "64", 0.0),
    ],
)
def test_prompts_that_a_benchmark_repeats_are_in_the_prefix_cache(tmp_path, source, prompt, batch, cached):
    row = rows()[-1] | {"silicon_data_source": source, "isl": prompt, "batch_size": batch}
    measured, _ = read_measurements(write(tmp_path / "data.csv", [row]))
    assert measured[0].traffic.cached == pytest.approx(cached)


def test_streams_wait_for_prompts_as_the_engine_schedules_them(tmp_path):
    found = [rows()[-1] | {"backend": engine} for engine in ("vllm", "trtllm", "sglang")]
    s = settings_of(read_measurements(write(tmp_path / "data.csv", found))[0])
    step = predict(s, replace(EXPECTED, interference=0.0), {}).tpot
    found, alone = predict(s, EXPECTED), predict(s, EXPECTED, {})
    waited = found.tpot - step
    assert waited[1] == pytest.approx(waited[0])
    assert waited[2] == pytest.approx(waited[0] / 2)
    later = found.ttft - alone.ttft
    assert later[:2] == pytest.approx([0, 0])
    assert later[2] == pytest.approx(waited[2] * s.output[2])


def test_two_widths_of_the_same_ranks_are_one(tmp_path):
    found = rows()[0] | {"tp_size": "64", "moe_tp_size": "8", "moe_ep_size": "8"}
    measured, _ = read_measurements(write(tmp_path / "data.csv", [found]))
    assert (measured[0].shape.tensor, len(measured[0].shape.roles)) == (8, 8)
    apart = found | {"tp_size": "8", "attention_dp_size": "8", "moe_tp_size": "1", "moe_ep_size": "64"}
    measured, _ = read_measurements(write(tmp_path / "data.csv", [apart]))
    assert (measured[0].shape.tensor, measured[0].shape.data, measured[0].running) == (1, 8, 1)


def test_a_file_that_is_no_table_is_named(tmp_path):
    file = tmp_path / "x.csv"
    file.write_text("a,b\n1,2\n")
    with pytest.raises(InputError, match=r"no columns backend, .* has these"):
        read_measurements(file)
    write(file, [rows()[0] | {"isl": "many"}])
    with pytest.raises(InputError, match="line 2"):
        read_measurements(file)
    with pytest.raises(InputError, match="cannot read"):
        read_measurements(tmp_path / "none.csv")
