"""Measures loading a model, and restoring a lost expert or the experts of a lost rank.

    python -m benchmarks.loading [--gib 2] [--ranks 4] [--json FILE] [--folder WHERE]

A Mixtral folder of random bfloat16 is written to disk, converted, copied to the host's memory, and loaded by all ranks
at once through the code that a rank of the server runs (weights, then the experts of its slots, float32). Peak memory
is the high-water mark of each process (VmHWM), less that of one that only imports the same modules; of a rank, less
that before it reads, with JAX started and programs loaded.

The same is done with the published folder read in place (`moejax serve --in-place`): its checksums are recorded, and
all ranks read their bytes from the safetensors.

Then one expert, one rank's share and the whole checkpoint are read; bytes are counted by the kernel (rchar). Files that
were just written are in the page cache, so the seconds are those of memory, not of a disk.
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer, models

from benchmarks.machine import high_water, machine, read_bytes
from moejax.checkpoint.checkpoint import load_params
from moejax.checkpoint.download import cache_folder
from moejax.checkpoint.families import array_sources, read_config
from moejax.checkpoint.host_store import HostStore
from moejax.checkpoint.published_store import open_store, record_checksums
from moejax.config.model_config import ModelConfig
from moejax.config.parameter_counts import expert_bytes, parameter_count
from moejax.config.step_inputs import Bucket
from moejax.runtime.executables import ExecutableStore
from moejax.runtime.live_weights import LiveArrays
from moejax.runtime.programs import LocalPrograms, ModelShape
from planner import solve
from planner.inputs.cluster import Cluster
from planner.inputs.workload import Workload
from planner.plan.plan import Plan

SHARD = 256 << 20
REPEATS = 20
MEASURED = """
import importlib, sys
from benchmarks.machine import high_water
module = importlib.import_module(sys.argv[1])
status = module.main(sys.argv[2:]) if sys.argv[2:] else 0
print(high_water())
sys.exit(status)
"""
Values = dict[str, Any]


def config(gib: float) -> Values:
    """A Mixtral of about `gib` GiB in bfloat16: width 1024, 8 experts of 3584, as many layers as fit."""
    layer = 2 * (8 * 3 * 1024 * 3584 + 1024 * (1024 + 2 * 256) + 1024 * 1024)
    ends = 2 * 2 * 32_000 * 1024
    return {
        "model_type": "mixtral",
        "architectures": ["MixtralForCausalLM"],
        "vocab_size": 32_000,
        "hidden_size": 1024,
        "intermediate_size": 3584,
        "num_hidden_layers": max(1, round((gib * 2**30 - ends) / layer)),
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 4096,
        "rope_theta": 1e6,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
    }


def write_folder(folder: Path, values: Values) -> int:
    """Write the published folder, shard by shard; returns its bytes of weights."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(values))
    words = {f"w{i}": i for i in range(values["vocab_size"])}
    Tokenizer(models.WordLevel(words, unk_token="w0")).save(str(folder / "tokenizer.json"))
    shapes = {t.name: t.shape for entry in array_sources(read_config(folder)) for t in entry.tensors}
    draw, shard, names, total = np.random.default_rng(0), {}, {}, 0
    for name, shape in shapes.items():
        shard[name] = _random(draw, shape)
        total += shard[name].nbytes
        if sum(a.nbytes for a in shard.values()) > SHARD or name == list(shapes)[-1]:
            file = f"model-{len(set(names.values())):05d}.safetensors"
            save_file(shard, folder / file)
            names |= dict.fromkeys(shard, file)
            shard = {}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    return total


def _random(draw: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Numbers of either sign below 1/32, made directly from random bits, which is fast."""
    bits = draw.integers(0, 2**16, math.prod(shape), np.uint16) & np.uint16(0x80FF) | np.uint16(0x3C00)
    return bits.view(ml_dtypes.bfloat16).reshape(shape)


def measured(module: str, *arguments: str) -> Values:
    """Run a module's `main` in a process of its own, or only import it: seconds, and peak of memory in bytes.

    The process reads its own peak: the figure that the kernel gives its parent includes the parent's memory at the
    fork.
    """
    began = time.monotonic()
    command = [sys.executable, "-c", MEASURED, module, *arguments]
    ended = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return {"seconds": time.monotonic() - began, "peak_bytes": int(ended.stdout.split()[-1])}


def noting(source: Path, place: Path) -> Values:
    """Record the checksums of a published folder: seconds, and bytes written."""
    began = time.monotonic()
    record_checksums(source, place, name="model", on_progress=lambda done, total: None)
    seconds = time.monotonic() - began
    return {"seconds": seconds, "bytes": sum(f.stat().st_size for f in place.iterdir())}


def load_on_ranks(store: Path, ranks: int) -> Values:
    """All ranks load at once; the figures of each."""
    here = [sys.executable, "-m", "benchmarks.loading", "--as-rank"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen([*here, f"{r}/{ranks}", "--folder", str(store)], **pipes) for r in range(ranks)]
    for process in processes:
        process.stdout.readline()
    began = time.monotonic()
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()
    said = [json.loads(process.communicate()[0]) for process in processes]
    return {"seconds": time.monotonic() - began, "ranks": said}


def be_a_rank(store: Path, rank: int, ranks: int) -> Values:
    """Load as a rank of the server does when it joins and adopts its first plan."""
    jax.config.update("jax_platforms", "cpu")
    device = jax.devices()[0]
    jax.block_until_ready(jax.device_put(np.zeros(1, np.float32), device))
    cfg = ModelConfig.load(store)
    shape = ModelShape(cfg=cfg, buckets=(Bucket(decode=2, tiles=0, max_pages=8),), page_size=32, pages=8)
    slots = slots_of(first_plan(cfg, ranks), rank)
    programs = LocalPrograms(shape, device, slots.shape[1], ExecutableStore(cache_folder() / "executables"))
    idle = high_water()
    print("ready", flush=True)
    sys.stdin.readline()
    began = time.monotonic()
    arrays = LiveArrays(shape, open_store(store))
    arrays.enter_device(device)
    arrays.fill(slots, programs, device)
    jax.block_until_ready([arrays.expert(0, 0), arrays.head])
    return {
        "seconds": time.monotonic() - began,
        "share_bytes": 4 * parameter_count(cfg) + (slots.size - experts(cfg)) * expert_bytes(cfg),
        "peak_bytes": high_water() - idle,
        "idle_bytes": idle,
    }


def restore(folder: Path, store: Path, ranks: int) -> Values:
    """Milliseconds and bytes read of one expert, one rank's share, and the whole checkpoint."""
    source = HostStore.open(store)
    slots = slots_of(first_plan(source.cfg, ranks), 0)
    share = [(layer, int(e)) for layer, row in enumerate(slots) for e in row if e >= 0]
    each = iter(share * REPEATS)
    first = _timed(lambda: source.read_experts([next(each)]), 1)
    return {
        "expert_first": first,
        "expert": _timed(lambda: source.read_experts([next(each)]), REPEATS),
        "rank_share_of_experts": _timed(lambda: source.read_experts(share), 3) | {"experts": len(share)},
        "rest": _timed(source.non_expert_params, 3),
        "whole_checkpoint": _timed(lambda: load_params(folder), 1),
    }


def _timed(read: Callable[[], object], repeats: int) -> Values:
    seconds, before = [], read_bytes()
    for _ in range(repeats):
        began = time.perf_counter()
        read()
        seconds.append(time.perf_counter() - began)
    return {"ms": 1e3 * statistics.median(seconds), "bytes": (read_bytes() - before) // repeats, "repeats": repeats}


def first_plan(cfg: ModelConfig, ranks: int) -> Plan:
    """The placement of experts in the server's first plan."""
    assert cfg.moe is not None
    workload = Workload(
        moe_layers=cfg.n_moe_layers,
        experts=cfg.moe.experts,
        experts_per_token=cfg.moe.experts_per_token,
        expert_bytes=expert_bytes(cfg),
    )
    return solve(workload, Cluster.local(ranks), survive_ranks=min(1, ranks - 1), pages_per_rank=1)


def slots_of(plan: Plan, rank: int) -> np.ndarray:
    """The experts of one rank's slots `[moe layers, S]`."""
    size = plan.slots_per_rank
    return np.array(plan.slots, np.int32)[:, rank * size : (rank + 1) * size]


def experts(cfg: ModelConfig) -> int:
    """Routed experts of all layers."""
    return cfg.n_moe_layers * (cfg.moe.experts if cfg.moe else 0)


def benchmark(folder: Path, gib: float, ranks: int) -> Values:
    """All measurements, in `folder`."""
    source, target, store = folder / "published", folder / "model", folder / "host" / "copy"
    weights = write_folder(source, config(gib))
    idle = measured("moejax.checkpoint.convert")
    conversion = measured("moejax.checkpoint.convert", str(source), str(target))
    again = measured("moejax.tools.inspect", str(source))
    noted = noting(source, folder / "noted")
    shared = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shared if shared.is_dir() else folder) as host:
        store = Path(host) / "copy"
        began = time.monotonic()
        copied = HostStore.create(target, store)
        copy_s = time.monotonic() - began
        return {
            "machine": machine(),
            "weights_bytes": weights,
            "layers": copied.cfg.n_layers,
            "expert_bytes_stored": expert_bytes(copied.cfg, 2),
            "check_headers": again,
            "convert": conversion | {"peak_over_imports_bytes": conversion["peak_bytes"] - idle["peak_bytes"]},
            "copy_to_host_memory": {"seconds": copy_s, "bytes": copied.bytes, "in_tmpfs": copied.folder == store},
            "load": load_on_ranks(copied.folder, ranks),
            "note_in_place": noted,
            "load_in_place": load_on_ranks(folder / "noted", ranks),
            "restore": restore(target, copied.folder, ranks),
        }


def report(result: Values) -> str:
    """The figures as text."""
    mib = 1 << 20
    convert, noted, restored = result["convert"], result["note_in_place"], result["restore"]
    peak = convert["peak_over_imports_bytes"] / mib
    lines = [
        f"weights       {result['weights_bytes'] / mib:8.0f} MiB bfloat16, {result['layers']} layers",
        f"check headers {result['check_headers']['seconds']:8.1f} s with start of the process",
        f"convert       {convert['seconds']:8.1f} s, peak {peak:.0f} MiB over imports",
        f"copy          {result['copy_to_host_memory']['seconds']:8.1f} s to host memory",
        f"load          {_loaded(result['load'])}",
        f"note in place {noted['seconds']:8.1f} s, {noted['bytes'] >> 10} KiB written",
        f"load in place {_loaded(result['load_in_place'])}",
    ]
    whole = restored["whole_checkpoint"]
    for name, row in restored.items():
        part = f"1/{whole['bytes'] / row['bytes']:.0f} of the bytes, 1/{whole['ms'] / row['ms']:.0f} of the time of all"
        lines.append(f"{name:<22} {row['ms']:9.1f} ms {row['bytes'] / mib:9.1f} MiB  ({part})")
    return "\n".join(lines)


def _loaded(load: Values) -> str:
    over = max(rank["peak_bytes"] / rank["share_bytes"] for rank in load["ranks"])
    share = load["ranks"][0]["share_bytes"] >> 20
    ranks = len(load["ranks"])
    return f"{load['seconds']:8.1f} s on {ranks} ranks at once, of float32 {share} MiB each; peak {over:.2f} times that"


def main() -> None:
    """Run everything, print it, and write it as JSON if asked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--gib", type=float, default=2.0, help="size of the published weights (default: 2)")
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--folder", type=Path, help="where to write the model (default: a temporary folder)")
    parser.add_argument("--as-rank", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.as_rank:
        rank, ranks = map(int, options.as_rank.split("/"))
        print(json.dumps(be_a_rank(options.folder, rank, ranks)))
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        result = benchmark(Path(folder), options.gib, options.ranks)
    print(report(result))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
