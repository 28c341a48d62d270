# /// script
# dependencies = [
#     "torch==2.14.1", "torchvision==0.29.1", "triton", "transformers==5.19.0", "aiohttp", "msgspec", "numpy",
#     "orjson", "pybase64", "pillow", "requests", "tqdm", "datasets", "huggingface_hub", "pyzmq", "psutil",
#     "ipython", "openai", "pydantic", "python-dateutil", "setproctitle", "uvicorn", "fastapi", "apache-tvm-ffi",
#     "sentencepiece", "compressed-tensors", "gguf",
# ]
# [tool.clients]
# name = "sglang.bench_serving"
# partial = "sglang==0.5.23"
# leave_out = ["*"]
# minutes = 8
# ///
"""SGLang's benchmark of a server, with the libraries that it imports alone. Torch and torchvision are of
one release: others cannot be loaded together."""

import json
import tempfile
from pathlib import Path

from clients import trials
from clients.trials import Lacks, command, trial

REQUESTS, TOKENS = 10, 16


def bench(backend: str) -> str:
    try:
        command("python", "-c", "import sglang.benchmark.serving")
    except AssertionError as error:
        reason = str(error).rpartition(" / ")[2]
        raise Lacks(f"it cannot be imported on a machine without an accelerator: {reason}") from None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "result.jsonl"
        where = ("--backend", backend, "--base-url", trials.base())
        model = ("--model", trials.model(), "--tokenizer", trials.model_folder())
        load = ("--dataset-name", "random-ids", "--random-input-len", "32", "--random-output-len", str(TOKENS))
        many = ("--num-prompts", str(REQUESTS), "--max-concurrency", "4", "--random-range-ratio", "1")
        command("python", "-m", "sglang.bench_serving", *where, *model, *load, *many, "--output-file", str(path))
        found = json.loads(path.read_text().splitlines()[-1])
    assert (found["completed"], found["total_output_tokens"]) == (REQUESTS, REQUESTS * TOKENS), found
    return f"{REQUESTS} of {REQUESTS} requests, first token after {found['median_ttft_ms']:.0f} ms (median)"


@trial("--backend vllm, completions")
def completions() -> str:
    return bench("vllm")


@trial("--backend sglang-oai-chat, chat completions")
def chat() -> str:
    return bench("sglang-oai-chat")


if __name__ == "__main__":
    trials.main()
