"""Measures the expert loads of a model: how often its routers choose each expert on a text.

    python -m benchmarks.planner_loads MODEL_FOLDER TEXT... --json FILE [--tokens 4096]

The file is what `moejax plan solve --loads`, `rebalance` and `python -m benchmarks.planner --loads` read.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import jax
import numpy as np
from tokenizers import Tokenizer

from moejax.checkpoint.checkpoint import load_params
from moejax.config.model_config import ModelConfig
from moejax.model.reference import forward
from moejax.tools.score import token_windows

WINDOW = 512  # tokens read at once


def router_counts(folder: Path, texts: list[str], tokens: int) -> np.ndarray:
    """Choices of each expert over the first `tokens` tokens of the texts, int [moe_layers, experts]."""
    cfg = ModelConfig.from_json((folder / "config.json").read_text())
    params = jax.tree.map(jax.numpy.asarray, load_params(folder, cfg))
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    windows = np.concatenate([token_windows(tokenizer, text, WINDOW) for text in texts])
    counts = np.zeros((cfg.n_moe_layers, cfg.moe.experts if cfg.moe else 1), np.int64)
    chosen = jax.jit(lambda p, w: forward(p, cfg, w)[1].chosen)
    for window in windows[: max(1, tokens // WINDOW)]:
        for layer, experts in enumerate(np.asarray(chosen(params, window[None]))):
            counts[layer] += np.bincount(experts.ravel(), minlength=counts.shape[1])
    return counts


def main() -> None:
    """Count and write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("texts", type=Path, nargs="+")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=4096)
    options = parser.parse_args()
    texts = [path.read_text() for path in options.texts]
    counts = router_counts(options.folder, texts, options.tokens)
    source = f"router choices on {', '.join(p.name for p in options.texts)}"
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps({"source": source, "loads": counts.tolist()}) + "\n")
    print((counts / counts.mean(axis=1, keepdims=True)).round(2))


if __name__ == "__main__":
    main()
