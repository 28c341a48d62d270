# /// script
# dependencies = ["guidellm==0.8.1"]
# [tool.clients]
# name = "guidellm"
# minutes = 8
# ///
"""GuideLLM: synthetic prompts at a fixed concurrency, over the APIs that it knows."""

import json
import tempfile
from pathlib import Path

from clients import trials
from clients.trials import command, trial

REQUESTS = 8


def bench(api: str) -> str:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "result.json"
        backend = f"kind=openai_http,target={trials.base()},model={trials.model()},request_format={api}"
        words = ("--backend", backend, "--profile", "kind=concurrent,streams=2")
        words += ("--data", "kind=synthetic_text,prompt_tokens=32,output_tokens=16")
        words += ("--tokenizer", f"kind=huggingface_auto,model={trials.model_folder()}")
        words += ("--constraint", f"kind=max_requests,count={REQUESTS}", "--output", f"kind=json,path={path}")
        command("guidellm", "run", *words, "--disable-console-interactive")
        (found,) = json.loads(path.read_text())["benchmarks"]
    totals = found["metrics"]["request_totals"]
    assert totals["successful"] >= REQUESTS, totals
    assert totals["errored"] == 0, totals
    return f"{totals['successful']} requests, none failed"


@trial("completions")
def completions() -> str:
    return bench("/v1/completions")


@trial("chat completions")
def chat() -> str:
    return bench("/v1/chat/completions")


@trial("Responses API")
def responses() -> str:
    return bench("/v1/responses")


if __name__ == "__main__":
    trials.main()
