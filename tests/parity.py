"""Our decoder against `transformers`: the same folder, the same tokens, logits of every position and greedy decoding.

    scripts/parity            rewrites docs/results/parity.md (needs the extra `parity`)

Ours runs as it is served: prefill in tiles, then one token per step through pages, on meshes of 1 and 4 ranks.
"""

import argparse
import contextlib
import dataclasses
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import numpy as np

import tests.conftest  # noqa: F401 - sets how JAX runs, before it is asked for devices
from moejax import kernels
from moejax.config import ModelConfig
from moejax.families import is_unused, read_config, tensor_names
from moejax.manifest import tensor_specs
from moejax.params import Params, is_spec, param_specs
from serving.batch import Bucket
from tests.moejax.families.published import CASES, Case, write_folder
from tests.moejax.stepping import Stepper, work

PROMPT, DECODED = 41, 64
BUCKET = Bucket(1, 2)
PAGES = (5, 2, 9, 11)
TOLERANCE = 1e-4
"""Of the largest logit: float32 over a few layers, summed in another order."""


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Of one model and seed: largest difference of logits over the largest logit, in prefill and in decoding, and how
    many of the greedy tokens are the same before the first that is not."""

    prefill: float
    decode: float
    tokens: int

    @property
    def holds(self) -> bool:
        """True if the two are the same model."""
        return max(self.prefill, self.decode) <= TOLERANCE and self.tokens == DECODED


def compare(case: Case, seed: int, ranks: int) -> Comparison:
    """Run both models on a prompt of their own seed."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "model"
        reference = write_folder(folder, case, seed)
        cfg = read_config(folder)
        params = load_folder(folder, cfg)
    prompt = np.random.default_rng(seed).integers(3, cfg.vocab_size, PROMPT).tolist()
    tokens, ours = decode(cfg, params, prompt, ranks)
    theirs = reference_logits(reference, prompt + tokens[:-1])
    difference = np.abs(ours - theirs).max(-1) / np.abs(theirs).max()
    same = theirs[PROMPT - 1 :].argmax(-1) == tokens
    agreed = DECODED if same.all() else int(same.argmin())
    return Comparison(float(difference[:PROMPT].max()), float(difference[PROMPT:].max()), agreed)


def load_folder(folder: Path, cfg: ModelConfig) -> Params:
    """All parameters of a published folder, by its family's name map; every tensor must have its place."""
    from safetensors.numpy import load_file

    found: dict[str, np.ndarray] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    leaves = {path: np.full(spec.shape, np.nan, np.float32) for path, spec in tensor_specs(cfg).items()}
    used = set()
    for entry in tensor_names(cfg):
        parts = []
        for tensor in entry.tensors:
            assert found[tensor.name].shape == tensor.shape, (tensor, found[tensor.name].shape)
            used.add(tensor.name)
            parts.append(found[tensor.name] if tensor.index is None else found[tensor.name][tensor.index])
        at = tuple(i for i in (entry.repeat, entry.expert) if i is not None)
        leaves[entry.path][at] = entry.array(parts)
    left = [name for name in found if name not in used and not is_unused(cfg, name)]
    assert not left, f"no place for {left}"
    assert not any(np.isnan(leaf).any() for leaf in leaves.values())
    tree = jax.tree.structure(param_specs(cfg), is_leaf=is_spec)
    return jax.tree.unflatten(tree, list(leaves.values()))


def decode(cfg: ModelConfig, params: Params, prompt: list[int], ranks: int) -> tuple[list[int], np.ndarray]:
    """Greedy tokens, and logits `[prompt + decoded - 1, V]` of every position that was computed, on the last rank."""
    table = np.zeros(0, int)
    if cfg.moe is not None:
        table = np.arange(-(-cfg.moe.experts // ranks) * ranks + (ranks if ranks > 1 else 0)) % cfg.moe.experts
    model = Stepper(cfg, params, ranks, len(table) // ranks, table)
    rank, logits, tokens = ranks - 1, [], []
    for start in range(DECODED):
        new, at = (prompt, 0) if start == 0 else ([tokens[-1]], PROMPT + start - 1)
        out = model.run(BUCKET, {rank: (work(new, at, PAGES),)})
        first, segment = (BUCKET.decode, BUCKET.segments - 1) if start == 0 else (0, 0)
        logits.append(model.logits(out, BUCKET, rank, first, len(new)))
        tokens.append(model.segment(out, BUCKET, rank, segment)[0])
    return tokens, np.concatenate(logits)


def reference_logits(model: Any, tokens: list[int]) -> np.ndarray:
    """Logits `[T, V]` of transformers at every position."""
    import torch

    with torch.no_grad():
        return model(torch.tensor([tokens]), use_cache=False).logits[0].numpy()


def table(rows: Iterable[tuple[str, str, int, list[Comparison]]]) -> str:
    """The page of results, in Markdown."""
    import torch
    import transformers

    how = "the kernels of `moejax.kernels` where a model's parts have one" if kernels.active() else "XLA alone"
    lines = [
        "# Parity with `transformers`",
        "",
        f"Made by `scripts/parity`: jax {jax.__version__}, transformers {transformers.__version__}, torch "
        f"{torch.__version__}, float32 on a CPU. Small random models written by transformers, read by",
        f"`moejax.families`, run through the paged step: a prompt of {PROMPT} tokens in tiles, then {DECODED} greedy "
        f"tokens, with {how}. Differences of logits are",
        f"the largest over all seeds and positions, over the largest logit; at most {TOLERANCE:g} is asked for.",
        "",
        "| model | family | ranks | seeds | prefill | decode | greedy tokens equal |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, family, ranks, found in rows:
        prefill, later = max(c.prefill for c in found), max(c.decode for c in found)
        equal, all_of = sum(c.tokens for c in found), DECODED * len(found)
        lines.append(f"| {name} | {family} | {ranks} | {len(found)} | {prefill:.1e} | {later:.1e} | {equal}/{all_of} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    """Compare all cases; the exit status is 1 if any differs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("docs/results/parity.md"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES), metavar="MODEL")
    arguments = parser.parse_args()
    with contextlib.suppress(kernels.KernelError):
        kernels.load()
    rows = []
    for name in arguments.only:
        for ranks in arguments.ranks:
            found = [compare(CASES[name], seed, ranks) for seed in range(arguments.seeds)]
            rows.append((name, CASES[name].rewrite.get("model_type", CASES[name].model_type), ranks, found))
            print(name, ranks, *found, sep="  ", flush=True)
    arguments.out.write_text(table(rows))
    return 0 if all(c.holds for *_, found in rows for c in found) else 1


if __name__ == "__main__":
    raise SystemExit(main())
