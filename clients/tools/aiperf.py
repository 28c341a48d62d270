# /// script
# dependencies = ["aiperf==0.13.0"]
# [tool.clients]
# name = "aiperf"
# minutes = 8
# ///
"""NVIDIA's AIPerf: synthetic prompts over chat, completions and the Responses API."""

import json
import tempfile
from pathlib import Path

from clients import trials
from clients.trials import command, trial

REQUESTS = 10
ONLINE = {"HF_HUB_OFFLINE": "", "TRANSFORMERS_OFFLINE": ""}
"""Offline it looks for a tokenizer in its cache alone, and refuses a folder."""


def bench(kind: str) -> str:
    with tempfile.TemporaryDirectory() as folder:
        where = ("-m", trials.model(), "--url", trials.base(), "--endpoint-type", kind, "--streaming")
        load = ("--synthetic-input-tokens-mean", "32", "--output-tokens-mean", "16", "--request-count", str(REQUESTS))
        more = ("--concurrency", "4", "--tokenizer", trials.model_folder(), "--artifact-dir", folder, "--ui", "none")
        command("aiperf", "profile", *where, *load, *more, environment=ONLINE)
        (path,) = Path(folder).rglob("profile_export_aiperf.json")
        found = json.loads(path.read_text())
    assert found["request_count"]["avg"] == REQUESTS, found["request_count"]
    assert not found.get("error_summary"), found["error_summary"]
    return f"{REQUESTS} of {REQUESTS} requests"


@trial("chat completions, streamed")
def chat() -> str:
    return bench("chat")


@trial("completions, streamed")
def completions() -> str:
    return bench("completions")


@trial("Responses API, streamed")
def responses() -> str:
    return bench("responses")


if __name__ == "__main__":
    trials.main()
