"""Our step programs over a mesh of devices within this process: prefill in tiles, then one token per step, through
pages."""

import tempfile
from pathlib import Path

import jax
import numpy as np

from moejax.checkpoint.families import array_sources, is_unused, read_config
from moejax.config.model_config import ModelConfig
from moejax.config.params import Params, is_spec, param_specs, tensor_specs
from serving.engine.batch import StepBucket
from tests.parity.comparison import DECODED, PROMPT, Comparison, draw_prompt, reference_logits
from tests.support.families.published import Case, write_folder
from tests.support.stepping import Stepper, work

BUCKET = StepBucket(1, 2)
PAGES = (5, 2, 9, 11)


def compare(case: Case, seed: int, ranks: int) -> Comparison:
    """Run both models on a prompt of their own seed."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "model"
        reference = write_folder(folder, case, seed)
        cfg = read_config(folder)
        params = load_folder(folder, cfg)
    prompt = draw_prompt(seed, cfg.vocab_size)
    tokens, ours = decode(cfg, params, prompt, ranks)
    theirs = reference_logits(reference, prompt + tokens[:-1])
    difference = np.abs(ours - theirs).max(-1) / np.abs(theirs).max()
    return Comparison.of(difference, theirs[PROMPT - 1 :].argmax(-1), tokens)


def load_folder(folder: Path, cfg: ModelConfig) -> Params:
    """All parameters of a published folder, by its family's name map; every tensor must have its place."""
    from safetensors.numpy import load_file

    found: dict[str, np.ndarray] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    leaves = {path: np.full(spec.shape, np.nan, np.float32) for path, spec in tensor_specs(cfg).items()}
    used = set()
    for entry in array_sources(cfg):
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
