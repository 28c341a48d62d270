"""Measures a step on a GPU against the limits of the device: copy bandwidth and bfloat16 products measured in the same
run.

    scripts/gpu [--json FILE] [--model mixtral-8x7b qwen3-30b-a3b] [--limit-s 560]
    python -m benchmarks.gpu ...                            the same, where jax[cuda12] is installed
    JAX_PLATFORMS=cpu python -m benchmarks.gpu --small      the whole program at sizes for a CPU

One device of 80 GB is enough. Weights are random bfloat16 of the published shapes, as many layers as fit (the note of a
row says how many), the cache float32. For each model:

  step       decoding at batch 1 to 64 and a prompt's 4,096 rows, by the programs that a rank runs: step, choice of
             tokens, commit. They are compiled and stored in one process, loaded and measured in another, where nothing
             may be compiled. `ms` is that of steps one after the other, `alone` of one that is waited for. The goals:
             at most 1.25 times the bytes moved, at least 60 % of the matmul rate.
  check      two layers of it against the references on the CPU
  experts    apply_experts, the grouped matmul;  attention: paged_attention. Both as a step calls them, against their
             references.

Every part is a process of its own, and the report has the error of a part that fails. Bytes and flops are the minimum
that the work needs (benchmarks/gpu/rows.py).
"""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks import command
from benchmarks.gpu.rows import TOLERANCE, Limits, Row, table
from benchmarks.machine import machine

MODELS = ("mixtral-8x7b", "qwen3-30b-a3b")
PARTS = ("compile", "step", "check", "experts", "attention")
"""The parts measured for each model, in this order; the limits of the device come first."""
Result = dict[str, Any]


def main() -> int:
    """Run everything, print it, and write it as JSON, after every part so that nothing measured is lost. The exit
    status is 1 if something failed, was wrong, or was compiled where nothing may be compiled."""
    options = parse()
    if options.part:
        options.out.write_text(json.dumps(_run_part(options)))
        return 0
    until = time.monotonic() + options.limit_s
    result: Result = {"machine": machine(), "small": options.small, "parts": {}}
    with tempfile.TemporaryDirectory() as folder:
        for part, model in [("limits", ""), *((part, model) for model in options.model for part in options.parts)]:
            name = f"{part} {model}".strip()
            began = time.monotonic()
            found = _in_a_process(options, part, model, Path(folder), result, until - began)
            result["parts"][name] = found | {"seconds": round(time.monotonic() - began, 1)}
            print(f"{name}: {found.get('error') or 'done'} ({time.monotonic() - began:.0f} s)", flush=True)
            command.write_json(options.json, _summary(result))
    print("\n".join(report(_summary(result))))
    return 0 if sound(result) else 1


def _in_a_process(
    options: argparse.Namespace, part: str, model: str, folder: Path, so_far: Result, left: float
) -> Result:
    """The measurements of a part, or its error."""
    if left < 10:
        return {"error": "not run: no time is left"}
    if part == "step" and "error" in so_far["parts"].get(f"compile {model}", {"error": ""}):
        return {"error": "not run: there are no programs"}
    out = folder / f"{part}-{model}.json"
    command = [
        sys.executable,
        "-m",
        "benchmarks.gpu",
        "--part",
        part,
        "--out",
        str(out),
        "--store",
        str(folder / model),
    ]
    command += ["--model", model or MODELS[0], *(["--small"] if options.small else [])]
    if part == "step":
        command += ["--layers", str(so_far["parts"][f"compile {model}"]["layers"])]
    variables = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92", "TF_CPP_MIN_LOG_LEVEL": "1"} | os.environ
    try:
        ended = subprocess.run(command, env=variables, stderr=subprocess.PIPE, text=True, timeout=left, check=False)
    except subprocess.TimeoutExpired:
        return {"error": f"stopped after {left:.0f} s"}
    if ended.returncode or not out.is_file():
        return {"error": f"ended with {ended.returncode}: {ended.stderr.strip()[-1500:]}"}
    return json.loads(out.read_text())


def _run_part(options: argparse.Namespace) -> Result:
    """One part, in this process."""
    import jax

    from benchmarks.gpu import limits, models
    from moejax.ops import cpu

    # As in a rank: an executable from JAX's own cache cannot be serialized again on a CPU.
    jax.config.update("jax_enable_compilation_cache", False)
    device = jax.devices()[0]
    if device.platform == "cpu":
        if not options.small:
            sys.exit("JAX finds no GPU here. Install jax[cuda12] (scripts/gpu does), or measure a CPU with --small.")
        cpu.load()
    if options.part == "limits":
        return dataclasses.asdict(limits.measure(small=options.small)) | {"device": device.device_kind}
    cfg = models.config(options.model[0], small=options.small)
    if options.part in ("experts", "attention"):
        return _kernel_part(options, cfg, device)
    from benchmarks.gpu import step

    cases = tuple(step.Case(*case) for case in step_cases(options.small))
    if options.part == "check":
        decode, prompt = step.Case(8, 0, 70), step.Case(0, 2, 0)
        return {"errors": {case.name: step.checked(cfg, case, device) for case in (decode, prompt)}}
    if options.part == "compile":
        return step.compiled(step.fitted(cfg, cases, device), options.store, device)
    shape = step.fitted(models.with_layers(cfg, options.layers), cases, device)
    rank = step.Rank(shape, options.store, device)
    rows = [step.run(rank, i, case, 2 if options.small else 10) for i, case in enumerate(cases)]
    return {
        "rows": [dataclasses.asdict(row) for row in rows],
        "layers": shape.cfg.n_layers,
        "load_seconds": rank.load_s,
        "compiles": rank.compiles.count,
    }


def _kernel_part(options: argparse.Namespace, cfg: Any, device: Any) -> Result:
    from benchmarks.gpu import kernels

    times = 2 if options.small else 32
    if options.part == "experts":
        rows = kernels.experts_rows(cfg, device, (1, 5) if options.small else (1, 4, 16, 64, 4096), times)
    else:
        cases = ((1, 1, 70), (3, 1, 50), (2, 32, 40))
        cases = cases if options.small else ((1, 1, 4096), (16, 1, 4096), (64, 1, 4096), (64, 32, 2048))
        rows = kernels.attention_rows(cfg, device, cases, times)
    return {"rows": [dataclasses.asdict(row) for row in rows]}


def step_cases(small: bool) -> tuple[tuple[int, int, int], ...]:
    """Decode rows, tiles of a prompt, and positions before them, of each step."""
    if small:
        return (1, 0, 40), (3, 0, 40), (0, 2, 0)
    return (1, 0, 512), (4, 0, 512), (16, 0, 512), (64, 0, 512), (0, 128, 0)


def _summary(result: Result) -> Result:
    """The result with every row beside its limit."""
    limits = result["parts"]["limits"]
    if "error" in limits:
        return result
    known = Limits(limits["bytes_per_s"], limits["flops_per_s"])
    return result | {"rows": [row.beside(known) for row in _rows(result)]}


def _rows(result: Result) -> Iterator[Row]:
    for part in result["parts"].values():
        yield from (Row(**row) for row in part.get("rows", ()))


def sound(result: Result) -> bool:
    """True when every part ran, every compared answer is right, and the second process compiled nothing;
    goals do not count."""
    errors = [row.error for row in _rows(result) if row.error is not None]
    for part in result["parts"].values():
        errors += part.get("errors", {}).values()
        if "error" in part or (part.get("compiles") or "NOT FINITE" in json.dumps(part)):
            return False
    return all(error <= TOLERANCE for error in errors)


def report(summary: Result) -> Iterator[str]:
    """The report as text."""
    parts = summary["parts"]
    limits = parts["limits"]
    if "error" not in limits:
        yield (
            f"{limits['device']}: copies {limits['bytes_per_s'] / 1e9:.0f} GB/s, "
            f"multiplies {limits['flops_per_s'] / 1e12:.1f} TFLOP/s in bfloat16"
        )
        yield from table(summary["rows"])
    for name, part in parts.items():
        if "programs" in part:
            yield f"{name}: {part['programs']} programs of {part['layers']} layers in {part['seconds']:.1f} s"
        if "compiles" in part:
            loaded = f"loaded in {part['load_seconds']:.2f} s in another process"
            yield f"{name}: {loaded}, {part['compiles']} compiles there"
        for case, error in part.get("errors", {}).items():
            yield f"{name}: {case} is {error:.1e} from the references" + ("" if error <= TOLERANCE else ": WRONG")
        if "error" in part:
            yield f"{name}: {part['error']}"


def parse() -> argparse.Namespace:
    """The command line."""
    parser = command.parser("benchmarks.gpu", __doc__)
    parser.add_argument("--model", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="of each model (default: all)")
    parser.add_argument("--small", action="store_true", help="sizes for a CPU")
    parser.add_argument("--limit-s", type=float, default=560, help="seconds for all parts together")
    parser.add_argument("--json", type=Path, help="write everything here")
    parser.add_argument("--part", choices=("limits", *PARTS), help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--store", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--layers", type=int, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
