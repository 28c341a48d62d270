"""Measured settings of other engines, as the planner would express them, from a table of AIConfigurator's form.

The table (CSV) has one row for each setting: model, chip (`system`), engine (`backend`), precision, lengths of prompt
and output, concurrency, parallelism, and the measured time to first token and time per output token. What the planner
cannot express is counted with the reason.
"""

from __future__ import annotations

import csv
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import ceil
from pathlib import Path

from planner.cost.measured_models import (
    NOT_GIVEN,
    KnownModel,
    engine_name,
    find_chip,
    find_measured,
    read_configs,
)
from planner.cost.measured_row import SettingRow, check_columns
from planner.cost.throughput import requests_that_fit
from planner.errors import InputError
from planner.inputs.cluster import Cluster
from planner.inputs.published import PublishedModel, WeightForm, workload_of
from planner.inputs.traffic import Traffic
from planner.inputs.workload import Workload
from planner.plan.shape import Shape
from planner.solver.shapes import cache_pages, memory_budget, rest_bytes

WIDE = ("bfloat16", 2.0)
PRECISIONS = {
    **dict.fromkeys(("", "bf16", "bfloat16", "fp16", "float16"), WIDE),
    "fp8": ("fp8", 1.0),
    "int8": ("int8", 1.0),
    "fp4": ("nvfp4", 0.5625),
    "nvfp4": ("nvfp4", 0.5625),
    "int4": ("int4", 0.5625),
}
"""The format of weights, and bytes of a parameter, by `precision`."""

DISTINCT, ROUNDS = 100, 10
"""Distinct prompts, and requests for each of the concurrency, of benchmarks whose prompts repeat (`_cached`)."""

TOGETHER_MS, MANY = 6.0, 512
"""At a concurrency of `MANY` and more, rows with a shorter time per token were not served together (the table's
note)."""


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """A measured setting: what ran, on which shape, with `running` requests on each tensor group, and its seconds.

    `running` is the concurrency, or as many requests as fit in memory; the others waited. `expert_tensor` ranks
    share each expert.
    """

    name: str
    model: str
    chip: str
    engine: str
    workload: Workload
    cluster: Cluster
    shape: Shape
    expert_tensor: int
    traffic: Traffic
    concurrency: int
    running: float
    tpot: float
    ttft: float


def read_measurements(
    path: str | Path, *, configs: Mapping[str, str] | None = None
) -> tuple[list[Measurement], Counter[str]]:
    """The settings of a table that the planner expresses, each once, and the number of rows left out by reason.

    `configs` has the config.json of models by their `model_path`, before the shipped ones. Raises InputError for a file
    that is no such table, and for a value that is none, with its line and column.
    """
    try:
        with open(path, newline="") as file:
            rows = csv.DictReader(file)
            check_columns(list(rows.fieldnames or ()), str(path))
            return _select(list(rows), str(path), read_configs(configs or {}))
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise InputError(f"{path} is no text; a table of measured settings is CSV") from None


def _select(
    rows: list[dict[str, str | None]], where: str, given: Mapping[str, KnownModel]
) -> tuple[list[Measurement], Counter[str]]:
    found: dict[tuple, Measurement] = {}
    left: Counter[str] = Counter()
    for number, row in enumerate(rows, start=2):
        try:
            got = _measurement(SettingRow(row), given)
        except InputError as error:
            raise InputError(f"{where}, line {number}: {error}") from None
        if isinstance(got, str):
            left[got] += 1
            continue
        key = (got.model, got.chip, got.engine, got.workload.weight_format, got.shape.axes, got.traffic)
        key = (*key, got.concurrency, round(got.tpot, 6))
        if key in found:
            left["the same measurement again"] += 1
        found.setdefault(key, got)
    return list(found.values()), left


def _measurement(row: SettingRow, given: Mapping[str, KnownModel]) -> Measurement | str:
    """The measurement of a row, or why the planner does not express it."""
    if (mode := row.text("mode").lower()) != "agg":
        return "prompts and answers on pools of their own" if mode == "disagg" else f"mode {mode}"
    path = row.text("model_path")
    if (model := given.get(path) or find_measured(path)) is None:
        return f"model {path or NOT_GIVEN}"
    if (chip := find_chip(row.text("system"))) is None:
        return f"chip {row.text('system') or NOT_GIVEN}"
    name, published = model
    if (form := _form(published, row)) is None:
        return f"precision {row.text('precision')}"
    if _may_speculate(name, row):
        return "may predict several tokens a step, which its row does not say"
    parallel = _parallelism(row)
    if isinstance(parallel, str):
        return parallel
    tensor, data, concurrency = parallel
    traffic = Traffic(prompt=row.count("isl"), output=row.count("osl"), cached=_cached(row, concurrency))
    tpot, ttft = row.seconds("silicon_tpot_ms"), row.seconds("silicon_ttft_ms")
    if not tpot:
        return "no measured time per output token"
    if concurrency >= MANY and tpot * 1e3 < TOGETHER_MS:
        return f"concurrency of {MANY} and more that was not served together"
    if tensor > chip.per_host or published.heads % tensor:
        return "tensor groups wider than a host, or that do not divide the heads"
    workload = workload_of(replace(published, form=form), name=name, cache=_cache(form, row), cache_scales=False)
    count = tensor * data
    shape = Shape(
        arch="collocated",
        tensor=tensor,
        dense=tensor,
        slots=ceil(workload.experts / count),
        roles=("collocated",) * count,
        groups=tuple(i // tensor for i in range(count)),
    )
    hosts = ceil(count / chip.per_host)
    cluster = Cluster.regular(chip.name, hosts, ceil(count / hosts), hardware=chip.hardware)
    fits = _fits(workload, cluster, shape, traffic)
    if fits < 1:
        return "weights and one request do not fit by the planner's count"
    return Measurement(
        name=row.text("id"),
        model=name,
        chip=chip.name,
        engine=engine_name(row.text("backend")),
        workload=workload,
        cluster=cluster,
        shape=shape,
        expert_tensor=_expert_tensor(row, count),
        traffic=traffic,
        concurrency=concurrency,
        running=min(concurrency / data, fits),
        tpot=tpot,
        ttft=ttft,
    )


def _parallelism(row: SettingRow) -> tuple[int, int, int] | str:
    """Ranks of a tensor group, number of tensor groups, and the concurrency, or the reason why they are not clear.

    Some rows name the product of two widths that are the same ranks: `tp4_ep4` on four devices as a tensor width of 16
    with experts over 4 x 4, and attention on n devices, each for itself, as a tensor width of n times n groups.
    """
    tensor, data = row.count("tp_size"), row.width("attention_dp_size")
    inner, outer = row.width("moe_tp_size"), row.width("moe_ep_size")
    batch, source = row.count("batch_size"), row.text("silicon_data_source")
    named = re.search(r"silicon_concurrency=(\d+)", source)
    if named is None and "gtl_job_id=" in source:
        return "replicas behind a router, with a concurrency that its row does not say"
    concurrency = int(named[1]) if named else batch * data
    if row.count("pp_size") != 1:
        return "pipelines"
    if concurrency != batch * data:
        return "a concurrency that is not its batch times its attention groups"
    if data == tensor > 1 and outer == tensor * data:
        tensor = 1
    elif inner == outer > 1 and tensor == inner * outer and data == 1:
        tensor = inner
    elif inner == outer > 1 and data == inner * outer and tensor == 1:
        data = inner
    return tensor, data, concurrency


def _expert_tensor(row: SettingRow, ranks: int) -> int:
    """Ranks that share each expert; 1 where experts are whole, as in rows that name the same ranks twice
    (`_parallelism`)."""
    inner, outer = row.width("moe_tp_size"), row.width("moe_ep_size")
    return inner if inner * outer == ranks else 1


def _may_speculate(model: str, row: SettingRow) -> bool:
    """Whether a row may be of a server that predicts several tokens a step: DeepSeek-V3 on TensorRT-LLM of builds with
    which B200s gave 0.5 to 0.65 of the time per token of the builds between them."""
    version = row.text("backend_version")
    builds = "rc6.post3" in version or (version == "1.1.0rc2.post2" and row.text("system").startswith("b200"))
    return model == "deepseek-v3" and engine_name(row.text("backend")) == "trtllm" and builds


def _cached(row: SettingRow, concurrency: int) -> float:
    """The share of prompts that are in the engine's prefix cache, since the benchmark sent them before.

    GenAI-Perf and AIPerf send `DISTINCT` different prompts unless a script asks for more (`--num-dataset-entries`), and
    scripts usually send `ROUNDS` requests for each of the concurrency; vLLM, SGLang and TensorRT-LLM keep prefixes
    unless asked not to. Rows do not say so. It is taken for the tables of this source whose lengths are in thousands:
    there, as many prompt tokens a second as were measured would take up to 0.83 of the chip's peak for their products
    alone, and with these shares (nothing is fitted to them) the times agree. Tables of the same source with lengths in
    powers of two are of other benchmarks, and show no repeated prompt.
    """
    source = row.text("silicon_data_source")
    repeats = "/aic-auto-gap-analysis/" in source and "gtl_job_id=" not in source and row.count("isl") % 1000 == 0
    return max(0.0, 1 - DISTINCT / (ROUNDS * concurrency)) if repeats else 0.0


def _fits(workload: Workload, cluster: Cluster, shape: Shape, traffic: Traffic) -> int:
    rest = rest_bytes(workload, shape.tensor, shape.dense)
    room = memory_budget(cluster)
    if room is None or rest + shape.slots * workload.slot_bytes > room:
        return 0
    pages = cache_pages(workload, cluster, shape.slots, tensor=shape.tensor, rest=rest)
    return requests_that_fit(workload, pages, traffic) if pages else 0


def _form(model: PublishedModel, row: SettingRow) -> WeightForm | None:
    """The form of the weights: `fp4` is NVFP4 on all matrices but those of latent attention, as published for these
    models, `int4` that of experts alone; gpt-oss has its own. None for a precision that is not known."""
    if model.family == "gpt_oss":
        return model.form
    path = row.text("model_path")
    precision = "fp8" if "FP8" in path else "fp4" if "NVFP4" in path else row.text("precision").lower()
    if precision not in PRECISIONS:
        return None
    name, low = PRECISIONS[precision]
    latent = model.latent is not None
    return WeightForm(
        format=name,
        base=2.0,
        attention=2.0 if name == "int4" or (latent and name == "nvfp4") else low,
        dense=2.0 if name == "int4" else low,
        shared=2.0 if name == "int4" else low,
        experts=low,
    )


def _cache(form: WeightForm, row: SettingRow) -> str:
    """The format of the KV cache: that which a checkpoint of ModelOpt names (`kv_cache_quant_algo`: FP8), as NVFP4 ones
    are, and all that NVIDIA publishes; 16-bit numbers otherwise. A row does not say more."""
    of_modelopt = form.format == "nvfp4" or row.text("model_path").startswith("nvidia/")
    return "fp8" if of_modelopt else "bfloat16"
