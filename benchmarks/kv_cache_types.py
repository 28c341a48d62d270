"""Measures what each data type of the KV cache costs: quality of unseen text, bytes of a token, and tokens a second.

    python -m benchmarks.kv_cache_types [--model smollm2-moe|tiny] [--data-type auto] [--json FILE]

For each type a server on one rank scores the texts of `benchmarks.precision` in windows, each on its own: bits per
byte, and how often the likeliest token at a position is the one of the first type. A step sees its own keys and values
as the cache holds them, so that scores show the whole cost. Then it decodes some long contexts side by side.
"""

import argparse
import asyncio
import math
import time
from pathlib import Path
from typing import Any

import httpx

from benchmarks import command
from benchmarks.launch import ROOT, launched
from benchmarks.machine import machine
from benchmarks.precision import DOMAINS
from serving.config import KV_CACHE_TYPES

_AT_ONCE = 8


def score(client: httpx.Client, text: str, window: int) -> tuple[float, list[str]]:
    """Bits per byte of a text in windows of `window` tokens, and the likeliest token at every position but the first of
    a window."""
    ids = client.post("/tokenize", json={"prompt": text}).raise_for_status().json()["tokens"]
    windows = [ids[at : at + window] for at in range(0, len(ids) - window + 1, window)] or [ids]
    nats, size, likeliest = 0.0, 0, []
    for at in range(0, len(windows), _AT_ONCE):
        body = {"prompt": windows[at : at + _AT_ONCE], "echo": True, "max_tokens": 0, "logprobs": 1}
        for choice in client.post("/v1/completions", json=body).raise_for_status().json()["choices"]:
            nats -= sum(choice["logprobs"]["token_logprobs"][1:])
            likeliest += [max(top, key=top.get) for top in choice["logprobs"]["top_logprobs"][1:]]
    for each in windows:
        size += len(client.post("/detokenize", json={"tokens": each[1:]}).json()["prompt"].encode())
    return nats / math.log(2) / size, likeliest


async def decode(address: str, prompt: list[int], streams: int, tokens: int) -> float:
    """Tokens a second of greedy streams side by side that have the same long prompt, the time of the prompts left
    out."""
    async with httpx.AsyncClient(base_url=address, timeout=600) as client:

        async def run(count: int) -> float:
            body = {"prompt": prompt, "max_tokens": count, "temperature": 0, "ignore_eos": True}
            began = time.perf_counter()
            answers = await asyncio.gather(*(client.post("/v1/completions", json=body) for _ in range(streams)))
            for answer in answers:
                answer.raise_for_status()
            return time.perf_counter() - began

        await run(1)
        short, long = await run(1), await run(1 + tokens)
        return streams * tokens / (long - short)


def measure(options: argparse.Namespace, form: str) -> dict[str, Any]:
    """Everything of one data type, on a server of its own."""
    chosen = ("--data-type", options.data_type, "--kv-cache-type", form)
    with (
        launched(options.model, 1, options=chosen) as server,
        httpx.Client(base_url=f"http://{server.http}", timeout=600) as client,
    ):
        texts = {name: (ROOT / f"models/tiny/held_out/{name}.txt").read_text() for name in DOMAINS}
        scored = {name: score(client, text, options.window) for name, text in texts.items()}
        metrics = client.get("/metrics").text.splitlines()
        size = next(float(line.split()[-1]) for line in metrics if line.startswith("moejax_kv_token_bytes "))
        ids = client.post("/tokenize", json={"prompt": "".join(texts.values())}).json()["tokens"][: options.context]
        speed = asyncio.run(decode(f"http://{server.http}", ids, options.streams, options.tokens))
    return {
        "token_bytes": size,
        "bits_per_byte": {name: bits for name, (bits, _) in scored.items()},
        "likeliest": [token for _, tokens in scored.values() for token in tokens],
        "tokens_per_second": speed,
    }


def table(measured: dict[str, dict[str, Any]]) -> list[str]:
    """Rows of a table in Markdown, compared with the first type."""
    rows = [f"| type | bytes a token | {' | '.join(DOMAINS)} | same likeliest token | tokens/s |", "|---" * 7 + "|"]
    first = next(iter(measured.values()))
    for form, found in measured.items():
        bits, base = found["bits_per_byte"], first["bits_per_byte"]
        cells = [f"{bits[name]:.4f} ({100 * (bits[name] / base[name] - 1):+.3f} %)" for name in DOMAINS]
        pairs = list(zip(found["likeliest"], first["likeliest"], strict=True))
        same = sum(a == b for a, b in pairs) / len(pairs)
        rows.append(
            f"| {form} | {found['token_bytes']:,.0f} | {' | '.join(cells)} | {same:.2%} | "
            f"{found['tokens_per_second']:.0f} |"
        )
    return rows


def main() -> int:
    """Measure, print, and write JSON."""
    options = parse()
    measured = {}
    for form in options.kv_cache_type:
        print(f"{options.model} with a cache in {form}", flush=True)
        measured[form] = measure(options, form)
    print("\n" + "\n".join(table(measured)))
    if options.json is not None:
        result = {form: found | {"likeliest": None} for form, found in measured.items()}
        command.write_json(options.json, {"machine": machine(), "model": options.model, "measured": result})
    return 0


def parse() -> argparse.Namespace:
    """The command line."""
    parser = command.parser("benchmarks.kv_cache_types", __doc__)
    forms = [form for form in KV_CACHE_TYPES if form != "auto"]
    parser.add_argument("--model", default="smollm2-moe", help="a model's name or folder")
    parser.add_argument("--data-type", default="auto", help="of the weights")
    parser.add_argument("--kv-cache-type", nargs="+", choices=forms, default=forms)
    parser.add_argument("--window", type=int, default=512, help="tokens that are scored together")
    parser.add_argument("--context", type=int, default=1500, help="tokens of the prompt before decode is measured")
    parser.add_argument("--streams", type=int, default=4, help="requests that decode side by side")
    parser.add_argument("--tokens", type=int, default=64, help="tokens that each of them decodes")
    parser.add_argument("--json", type=Path, help="write everything here")
    return parser.parse_args()


if __name__ == "__main__":
    raise SystemExit(main())
