"""Measures the quality of each weight format: bits per byte of unseen text, through the server.

    python -m benchmarks.precision [--model smollm2-moe|tiny] [--data-type float32 bfloat16 int8] [--json FILE]

For each data type a server on one rank scores the texts that `tiny` never saw in training (models/tiny/held_out: three
domains, 6,000 bytes each), in windows of some length, each on its own. Bits per byte do not depend on the tokenizer;
one per cent more means that each byte is one per cent harder to guess. For the same model the tokens are the same,
so differences between data types are exact although the text is short.
"""

import argparse
import math
from pathlib import Path
from typing import Any

import httpx

from benchmarks import command
from benchmarks.launch import ROOT, launched
from benchmarks.machine import machine
from serving.config import DATA_TYPES

DOMAINS = ("shakespeare", "wordnet", "python")
_AT_ONCE = 8


def bits_per_byte(client: httpx.Client, text: str, window: int = 512) -> tuple[float, list[list[float]]]:
    """Bits per byte of a text in windows of `window` tokens, each on its own, and the log-probabilities of all tokens
    but the first by window, requested as evaluation programs do. Tokens that do not fill a last window are left out if
    there is another window, as in `moejax.tools.score`."""
    ids = client.post("/tokenize", json={"prompt": text}).raise_for_status().json()["tokens"]
    windows = [ids[at : at + window] for at in range(0, len(ids) - window + 1, window)] or [ids]
    logprobs = []
    for at in range(0, len(windows), _AT_ONCE):
        body = {"prompt": windows[at : at + _AT_ONCE], "echo": True, "max_tokens": 0, "logprobs": 1}
        answer = client.post("/v1/completions", json=body).raise_for_status().json()
        logprobs += [choice["logprobs"]["token_logprobs"][1:] for choice in answer["choices"]]
    counted = sum(
        len(client.post("/detokenize", json={"tokens": window[1:]}).json()["prompt"].encode()) for window in windows
    )
    return -sum(map(sum, logprobs)) / math.log(2) / counted, logprobs


def measure(model: str, data_type: str, window: int) -> dict[str, float]:
    """Bits per byte of each domain on a server of its own."""
    options = ("--data-type", data_type)
    with (
        launched(model, 1, options=options) as server,
        httpx.Client(base_url=f"http://{server.http}", timeout=600) as client,
    ):
        texts = {name: (ROOT / f"models/tiny/held_out/{name}.txt").read_text() for name in DOMAINS}
        return {name: round(bits_per_byte(client, text, window)[0], 5) for name, text in texts.items()}


def table(measured: dict[str, dict[str, float]]) -> list[str]:
    """Rows of a table in Markdown, each difference in per cent of the first data type's."""
    rows = ["| data type | " + " | ".join(DOMAINS) + " |", "|---" * (1 + len(DOMAINS)) + "|"]
    first = next(iter(measured.values()))
    for data_type, bits in measured.items():
        cells = [f"{bits[name]:.4f} ({100 * (bits[name] / first[name] - 1):+.3f} %)" for name in DOMAINS]
        rows.append(f"| {data_type} | {' | '.join(cells)} |")
    return rows


def main() -> int:
    """Measure, print, and write JSON."""
    arguments = parse()
    measured: dict[str, dict[str, float]] = {}
    for data_type in arguments.data_type:
        print(f"{arguments.model} in {data_type}", flush=True)
        measured[data_type] = measure(arguments.model, data_type, arguments.window)
    print("\nbits per byte\n" + "\n".join(table(measured)))
    if arguments.json is not None:
        result: dict[str, Any] = {"machine": machine(), "model": arguments.model, "window": arguments.window}
        command.write_json(arguments.json, result | {"bits_per_byte": measured})
    return 0


def parse() -> argparse.Namespace:
    """The command line."""
    parser = command.parser("benchmarks.precision", __doc__)
    parser.add_argument("--model", default="smollm2-moe", help="a model's name or folder")
    parser.add_argument("--data-type", nargs="+", choices=DATA_TYPES, default=list(DATA_TYPES))
    parser.add_argument("--window", type=int, default=512, help="tokens, at most the model's context")
    parser.add_argument("--json", type=Path, help="write everything here")
    return parser.parse_args()


if __name__ == "__main__":
    raise SystemExit(main())
