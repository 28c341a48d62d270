"""Describes a model before it is served: configuration, parameters, bytes, cache, a first plan.

    python -m moejax.tools.inspect MODEL [--ranks 4] [--data-type int8] [--json]
    python -m moejax.tools.inspect --families [--json]        the model families and what can be done with each

MODEL is a name, a folder (ours or published), or a config.json.

Of a published folder the headers of all files are read and checked against the configuration, no weight is.
"""

import argparse
import collections
import dataclasses
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import jax.numpy as jnp
import numpy as np

from moejax.checkpoint.families import array_sources, read_config
from moejax.checkpoint.manifest import Manifest
from moejax.checkpoint.model_folder import TOKENIZERS
from moejax.checkpoint.published import check_tensors, packed_form, published_name, stored_dtypes
from moejax.checkpoint.safetensors import SafetensorsFolder
from moejax.config.config_values import ConfigError
from moejax.config.kv_cache import bytes_per_token
from moejax.config.layer_states import state_bytes
from moejax.config.model_config import ModelConfig, WeightFormat
from moejax.config.packed_form import PackedForm
from moejax.config.parameter_counts import expert_counts, parameter_count
from moejax.config.weight_formats import bytes_per_expert, usual_form, weight_bytes
from moejax.tools.rank_format import (
    AUTO,
    PUBLISHED,
    format_as_stored,
    published_workload,
    stored_note,
    widening_note,
)
from moejax.tools.resolve import ensure_model, is_published, published_place
from planner.errors import NoFeasiblePlan
from planner.inputs.cluster import Cluster
from planner.inputs.layer_states import SNAPSHOTS_PER_REQUEST, STATE_COPIES
from planner.inputs.published import CARDS_WITHOUT_EMBEDDING, FAMILIES, NOT_READ
from planner.inputs.workload import Workload
from planner.solver.problem import Problem
from planner.solver.solve import solve

RANKS = 4
SERVED, NOT_YET = "served", "not yet"
Values = dict[str, Any]


def describe(model: str, ranks: int = RANKS, weights: str = AUTO) -> Values:
    """Everything about a model whose matrices ranks hold in this format, `published` or `auto` as in `serve`, as data;
    bytes unless the key says otherwise.

    Raises ConfigError for an architecture that is not served, CheckpointError for weights that are not those of the
    configuration, AssetUnavailable when a model known by name cannot be had.
    """
    path = published_place(Path(model))
    if path.is_file():
        cfg, folder = read_config(path, name=path.stem if path.stem not in ("config", "params") else None), None
    elif is_published(path):
        cfg, folder = read_config(path, name=published_name(path)), path
    else:
        folder = ensure_model(model)
        cfg = ModelConfig.load(folder)
    if weights != AUTO:
        form = _published_format(path, folder, cfg) if weights == PUBLISHED else weights
        cfg = dataclasses.replace(cfg, weights=form)
        packed = _packed_form(path, folder, cfg) if weights == PUBLISHED else None
        cfg = cfg if packed is None else cfg.with_packed(packed)
    return {
        "name": cfg.name,
        "family": cfg.family,
        "layers": dict(collections.Counter(cfg.layer_kinds)),
        "config": json.loads(cfg.to_json()),
        "parameters": parameter_count(cfg),
        "active_parameters": active_parameters(cfg),
        "weights": _weights(folder, cfg) if folder is not None else {},
        "tokenizer": _tokenizer(folder) if folder is not None else {},
        "served_bytes": weight_bytes(cfg, experts=True) + weight_bytes(cfg, experts=False),
        "expert_bytes": bytes_per_expert(cfg),
        "cache_bytes_per_token": bytes_per_token(cfg),
        "cache_bytes_of_full_context": bytes_per_token(cfg) * cfg.max_context,
        "state_bytes": state_bytes(cfg),
        "plan": first_plan(cfg, ranks),
        "note": _format_note(path, folder, cfg) if weights == PUBLISHED else "",
    }


def _packed_form(path: Path, folder: Path | None, cfg: ModelConfig) -> PackedForm | None:
    """The form in which ranks hold matrices as they are published; of a configuration alone the usual one."""
    if folder is None:
        published = published_workload(path)
        return None if published is None else usual_form(cfg, published.weight_format)
    return packed_form(cfg, SafetensorsFolder.open(folder)) if is_published(folder) else None


def _published_format(path: Path, folder: Path | None, cfg: ModelConfig) -> WeightFormat:
    """The format in which `serve --data-type published` has ranks hold the matrices that are not kept as they are."""
    published = published_workload(path) if folder is None or is_published(folder) else None
    if folder is not None:
        return format_as_stored(cfg, _stored_dtypes(folder, cfg), published)
    if published is None:
        raise ConfigError(f"{path} does not say in which form the weights are published. Give another --data-type.")
    return "float32" if published.weight_format in ("float32", "float16") else "bfloat16"


def _format_note(path: Path, folder: Path | None, cfg: ModelConfig) -> str:
    """The note of `serve --data-type published`: the bytes in the folder, and the bytes in the ranks."""
    if folder is not None and not is_published(folder):
        return stored_note(cfg, _stored_dtypes(folder, cfg))
    return widening_note(cfg, published_workload(path))


def _stored_dtypes(folder: Path, cfg: ModelConfig) -> Mapping[str, np.dtype]:
    if is_published(folder):
        return stored_dtypes(cfg, SafetensorsFolder.open(folder), None)
    return {name: jnp.dtype(tensor.dtype) for name, tensor in Manifest.load(folder).tensors.items()}


def active_parameters(cfg: ModelConfig) -> int:
    """Parameters that one token touches, as the family's model cards count them."""
    held, used = expert_counts(cfg)
    uncounted = cfg.vocab_size * cfg.d_model if cfg.family in CARDS_WITHOUT_EMBEDDING and not cfg.tied_head else 0
    return parameter_count(cfg) - held + used - uncounted


def first_plan(cfg: ModelConfig, ranks: int) -> Values:
    """The first plan of `moejax serve --ranks`, and the bytes that each rank would hold."""
    experts, chosen = (cfg.moe.experts, cfg.moe.experts_per_token) if cfg.moe else (0, 0)
    one, rest = bytes_per_expert(cfg), weight_bytes(cfg, experts=False)
    workload = Workload(
        name=cfg.name,
        layers=cfg.n_layers,
        moe_layers=cfg.n_moe_layers,
        experts=experts,
        experts_per_token=chosen,
        expert_bytes=one,
        rest_bytes=rest,
        cache_bytes_per_token=bytes_per_token(cfg),
        state_bytes=state_bytes(cfg),
        hidden_bytes=4 * cfg.d_model,
        weight_format=cfg.weights,
    )
    try:
        survive = min(1, ranks - 1)
        plan = solve(Problem(workload=workload, cluster=Cluster.local(ranks), survive_ranks=survive, pages_per_rank=1))
    except NoFeasiblePlan as error:
        return {"ranks": ranks, "reason": str(error)}
    spare = ranks * plan.slots_per_rank - experts
    return {
        "ranks": ranks,
        "slots_per_rank": plan.slots_per_rank,
        "second_copies_per_layer": spare,
        "bytes_per_rank": rest + cfg.n_moe_layers * plan.slots_per_rank * one,
        "bytes_of_experts_per_rank": cfg.n_moe_layers * plan.slots_per_rank * one,
    }


def families() -> list[Values]:
    """Every known family: its `model_type`, whether it is served, and why it is not."""
    rows = [
        {
            "model_type": kind,
            "architectures": list(family.architectures),
            "state": SERVED,
            "reason": "",
        }
        for kind, family in FAMILIES.items()
    ]
    rows += [
        {"model_type": kind, "architectures": [], "state": NOT_YET, "reason": f"the decoder lacks {reason}"}
        for kind, reason in NOT_READ.items()
    ]
    order = (SERVED, NOT_YET)
    return sorted(rows, key=lambda row: (order.index(row["state"]), row["model_type"]))


def _weights(folder: Path, cfg: ModelConfig) -> Values:
    """Form, number formats and bytes of the stored weights, after checking them against the configuration."""
    if is_published(folder):
        stored = SafetensorsFolder.open(folder)
        check_tensors(cfg, stored)
        names = {tensor.name for entry in array_sources(cfg) for tensor in entry.tensors}
        formats = {stored.form(name) for name in names}
        return {"form": "safetensors", "tensors": len(names), "formats": sorted(formats), "bytes": stored.bytes}
    manifest = Manifest.load(folder)
    manifest.check_config(cfg, folder)
    tensors = manifest.tensors.values()
    return {
        "form": "orbax",
        "tensors": len(tensors),
        "formats": sorted({jnp.dtype(t.dtype).name for t in tensors}),
        "bytes": sum(t.bytes for t in tensors),
    }


def _tokenizer(folder: Path) -> Values:
    files = sorted({file.name for pattern in TOKENIZERS for file in folder.glob(pattern)})
    settings = folder / "tokenizer_config.json"
    template = (folder / "chat_template.jinja").is_file() or (folder / "chat_template.json").is_file()
    if not template and settings.is_file():
        template = bool(json.loads(settings.read_text("utf-8-sig")).get("chat_template"))
    return {"files": files, "chat_template": template}


def _report(found: Values) -> str:
    """The description for people."""
    moe, plan, weights = found["config"]["moe"], found["plan"], found["weights"]
    kinds = ", ".join(f"{count} {kind}" for kind, count in found["layers"].items())
    rows = [
        ("model", f"{found['name']} ({found['family']})"),
        ("layers", f"{kinds}; width {found['config']['d_model']}"),
        ("parameters", f"{found['parameters']:,}, of which a token uses {found['active_parameters']:,}"),
    ]
    if moe:
        each = _size(found["expert_bytes"])
        rows.append(("experts", f"{moe['experts']} per layer, {moe['experts_per_token']} per token, {each} each"))
    if weights:
        text = (
            f"{weights['form']}, {weights['tensors']} tensors, {', '.join(weights['formats'])}: whole and as configured"
        )
        rows.append(("weights", f"{_size(weights['bytes'])} ({text})"))
        chat = "with" if found["tokenizer"]["chat_template"] else "without"
        rows.append(("tokenizer", f"{', '.join(found['tokenizer']['files']) or 'missing'}, {chat} chat template"))
    cache = f"{_size(found['cache_bytes_per_token'])} per token, {_size(found['cache_bytes_of_full_context'])} at"
    rows.append(("cache", f"{cache} {found['config']['max_context']:,} tokens (float32)"))
    if found["state_bytes"]:
        layers = len(found["config"]["state_layers"])
        each = _size(found["state_bytes"])
        many = f"{STATE_COPIES} for each request and {SNAPSHOTS_PER_REQUEST} more for prefix caching"
        rows.append(("states", f"{each} of {layers} layers, {many} (float32)"))
    rows.append((f"on {plan['ranks']} ranks", _plan_text(plan, found["config"]["weights"])))
    if found["note"]:
        rows.append(("note", found["note"]))
    return "\n".join(f"{label:<12} {text}" for label, text in rows)


def _plan_text(plan: Values, form: str) -> str:
    if "reason" in plan:
        return plan["reason"]
    text = f"{_size(plan['bytes_per_rank'])} of weights on each ({form})"
    if plan["slots_per_rank"]:
        text += (
            f", {plan['slots_per_rank']} expert slots per layer, {plan['second_copies_per_layer']} of all hold copies"
        )
    return text


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def _families_report(rows: list[Values]) -> str:
    wide = max(len(", ".join(row["architectures"])) for row in rows)
    return "\n".join(
        f"{row['model_type']:<17} {', '.join(row['architectures']):<{wide}} {row['state']}"
        f"{': ' if row['reason'] else ''}{row['reason']}"
        for row in rows
    )


def main(arguments: list[str] | None = None) -> int:
    """Print the description; the exit status is 1, with the cause in one line, when the model is unusable."""
    parser = argparse.ArgumentParser(prog="moejax inspect", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("model", nargs="?", help="a known name, a model folder (ours or published), or a config.json")
    parser.add_argument("--ranks", type=int, default=RANKS, help=f"ranks of the first plan (default: {RANKS})")
    parser.add_argument(
        "--data-type",
        choices=(*get_args(WeightFormat), PUBLISHED, AUTO),
        default=AUTO,
        help="weight format of the ranks; published and auto as for `moejax serve`",
    )
    parser.add_argument("--families", action="store_true", help="list the model families instead")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    given = parser.parse_args(arguments)
    if not given.model and not given.families:
        parser.error("MODEL is missing")
    if given.ranks < 1:
        parser.error(f"--ranks is {given.ranks}; it must be at least 1")
    try:
        found: Any = families() if given.families else describe(str(given.model), given.ranks, given.data_type)
    except (OSError, ValueError, RuntimeError) as error:
        print(f"moejax: {error}", file=sys.stderr)
        return 1
    if given.json:
        print(json.dumps(found))
    else:
        print(_families_report(found) if given.families else _report(found))
    return 0


if __name__ == "__main__":
    try:
        status = main()
        sys.stdout.flush()
    except BrokenPipeError:  # the reader, for example `head`, has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 1
    sys.exit(status)
