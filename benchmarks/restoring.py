"""Measures from which context length on restoring a lost request's cache is quicker than computing it again.

    python -m benchmarks.restoring [--model smollm2-moe|tiny] [--contexts 32,64,...] [--rounds N] [--json FILE]

On one rank in this process: the context is prefilled in steps of two tiles, as after a loss while others decode, and
restored from a KV replica in memory, in pieces of 256 entries. Messages between front and ranks, and the steps of other
requests in between, are in neither. The last lines are the cost of the replica while nothing fails: after each step the
new entries are copied, beside the front's work on the answer.
"""

import os
import sys
from pathlib import Path

os.environ.setdefault("NPROC", "1")
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_multi_thread_eigen=false".strip()

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import command
from benchmarks.machine import machine
from benchmarks.packed import packed
from benchmarks.steady_state import PAGE
from benchmarks.timing import median_ms
from moejax.checkpoint.host_store import HostStore
from moejax.config.kv_cache import bytes_per_token, empty_cache
from moejax.config.mesh import make_mesh
from moejax.config.model_config import ModelConfig
from moejax.config.params import init_params
from moejax.config.step_inputs import Bucket
from moejax.model.decoder import StepOutputs
from moejax.model.step_shape import StepShape
from moejax.ops import cpu
from moejax.runtime import steps
from moejax.runtime.kv_transfer import EntryWriter, rows_by_entry, written_rows
from moejax.tools.resolve import ensure_model
from planner.plan.step_layout import TILE
from serving.engine.batch import ScheduledRequest
from serving.engine.batch import StepBucket as Shape
from serving.executor.kv_replica import PIECE_ENTRIES, KVReplica
from serving.protocol.sampling import ResolvedSampling

PREFILL, WRITE, DECODE = Shape(2, 2), Shape(32, 8), Shape(8, 0)
"""Buckets of the steps that compute a context, of the programs that write one, and of the steps that are copied."""
CONTEXTS = "8,16,32,64,128,256,512,1024"


class OneRank:
    """The programs and the cache of a rank that serves alone, with a KV replica."""

    def __init__(self, cfg: ModelConfig, contexts: list[int]) -> None:
        self.cfg = cfg
        self.pages = -(-max(contexts) // PAGE) + 1
        self.device = jax.devices()[0]
        self._mesh = make_mesh([self.device])
        self._params = init_params(cfg, jax.random.key(0))
        experts = cfg.moe.experts if cfg.moe else 1
        self._routes = jnp.tile(jnp.arange(experts, dtype=jnp.int32), (1, cfg.n_moe_layers, 1))
        self._slots = experts
        self.cache = jax.device_put(empty_cache(cfg, self.pages * PAGE), self.device, may_alias=False)
        self._writer = EntryWriter(cfg, [self.bucket(WRITE)])
        self._piece = np.zeros((PIECE_ENTRIES, bytes_per_token(cfg)), np.uint8)
        file = os.memfd_create("moejax-cache")
        self.copy = KVReplica.create(file, self.pages * PAGE, bytes_per_token(cfg))
        os.close(file)

    def step(self, shape: Shape, works: tuple[ScheduledRequest, ...]) -> tuple[np.ndarray, StepOutputs]:
        """Run one step and its commit; returns the step's inputs and outputs."""
        bucket = self.bucket(shape)
        inputs = packed(shape, works, PAGE, self.pages)
        static = StepShape(cfg=self.cfg, bucket=bucket, ranks=1, slots=self._slots, page_size=PAGE)
        arguments = steps.StepArguments(
            params=self._params, cache=self.cache, expert_to_slot=self._routes, packed=jnp.asarray(inputs)
        )
        out = steps.run_step(arguments, shape=static, mesh=self._mesh)
        self.cache = jax.block_until_ready(steps.run_commit(self.cache, out.new_kv, inputs, bucket=bucket))
        return inputs, out

    def prefill(self, tokens: int) -> None:
        """Compute a context from its beginning."""
        for start in range(0, tokens, PREFILL.tiles * TILE):
            self.step(PREFILL, (self.work(start, min(PREFILL.tiles * TILE, tokens - start)),))

    def restore(self, tokens: int) -> None:
        """Restore a context from the replica to the cache."""
        for first in range(0, tokens, PIECE_ENTRIES):
            at = np.arange(first, min(first + PIECE_ENTRIES, tokens))
            rows = self.copy.read(at, np.full(len(at), 5), at, self._piece)
            rows = rows.reshape(len(at), self.cfg.n_layers, -1).swapaxes(0, 1)
            self.cache = self._writer.write(self.cache, at, rows, lambda _: self._commit, self.device)
        jax.block_until_ready(self.cache)

    def fill_copy(self, tokens: int) -> None:
        """Put a context into the replica; its values do not matter."""
        at = np.arange(tokens)
        self.copy.write(at, np.full(tokens, 5), at, np.zeros((tokens, self.copy.entry_bytes), np.uint8))

    def protect(self, shape: Shape, inputs: np.ndarray, out: StepOutputs) -> None:
        """Replicate a step, as a rank does after it has answered it."""
        wrote = written_rows(inputs, self.bucket(shape))
        self.copy.write(wrote.entries, wrote.tokens, wrote.positions, rows_by_entry(out.new_kv, wrote.rows))
        self.copy.seal(0)

    def work(self, start: int, count: int) -> ScheduledRequest:
        """Tokens of the only request."""
        greedy = ResolvedSampling(max_tokens=1, seed=0, temperature=0.0)
        pages = tuple(range(self.pages))
        return ScheduledRequest(
            request_id="a", start=start, tokens=(5,) * count, pages=pages, samples=True, sampling=greedy
        )

    def bucket(self, shape: Shape) -> Bucket:
        """The bucket with room for the longest context."""
        return Bucket(decode=shape.decode, tiles=shape.tiles, max_pages=self.pages)

    def _commit(self, cache, new, inputs):
        return steps.run_commit(cache, new, inputs, bucket=self.bucket(WRITE))


def copying(rank: OneRank, rounds: int) -> dict[str, float]:
    """Milliseconds of a decode step and of a prefill step, and of copying what they wrote."""
    found = {}
    for name, shape, works in (
        ("decode", DECODE, tuple(rank.work(start, 1) for start in range(DECODE.decode))),
        ("prefill", PREFILL, (rank.work(0, PREFILL.tiles * TILE),)),
    ):
        inputs, out = rank.step(shape, works)
        found[f"{name}_step_ms"] = median_ms(lambda s=shape, w=works: rank.step(s, w), rounds)
        found[f"{name}_copy_ms"] = median_ms(lambda s=shape, p=inputs, o=out: rank.protect(s, p, o), rounds)
    return found


def main() -> int:
    """Measure, print, and write JSON."""
    parser = command.parser("benchmarks.restoring", __doc__)
    parser.add_argument("--model", default="smollm2-moe")
    parser.add_argument("--contexts", default=CONTEXTS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    cpu.load()
    cfg = HostStore.create(ensure_model(options.model)).cfg
    contexts = sorted(int(n) for n in options.contexts.split(","))
    rank = OneRank(cfg, contexts)
    rank.fill_copy(max(contexts))
    print(f"{bytes_per_token(cfg) / 1e3:.0f} KB of cache a token\n{'context':>8} {'recompute':>10} {'restore':>8} ms")
    runs = []
    for context in contexts:
        recompute = median_ms(lambda n=context: rank.prefill(n), options.rounds)
        restore = median_ms(lambda n=context: rank.restore(n), options.rounds)
        runs.append({"context": context, "recompute_ms": recompute, "restore_ms": restore})
        print(f"{context:8} {recompute:10.1f} {restore:8.1f} {recompute / restore:7.1f}x", flush=True)
    even = next((run["context"] for run in runs if run["restore_ms"] < run["recompute_ms"]), None)
    print(f"restoring is quicker from {even} tokens on, of those tried")
    steady = copying(rank, 4 * options.rounds)
    for name in ("decode", "prefill"):
        step, copy = steady[f"{name}_step_ms"], steady[f"{name}_copy_ms"]
        print(f"{name} step {step:.2f} ms, copying what it wrote {copy:.3f} ms: {copy / step:.2%}")
    if options.json is not None:
        found = {"machine": machine(), "model": options.model, "runs": runs, "break_even": even, "steady": steady}
        command.write_json(options.json, found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
