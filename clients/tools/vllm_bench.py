# /// script
# dependencies = ["torch==2.13.0"]
# [tool.clients]
# name = "vllm bench serve"
# partial = "vllm==0.33.0"
# leave_out = [
#     "torch", "torchaudio", "torchvision", "torchcodec", "PyNvVideoCodec", "flashinfer-python", "apache-tvm-ffi",
#     "tilelang", "nvidia-cudnn-frontend", "nvtx", "fastsafetensors", "instanttensor", "nvidia-cutlass-dsl",
#     "quack-kernels", "tokenspeed-mla", "humming-kernels",
# ]
# minutes = 8
# ///
"""vLLM's benchmark of a server, without the libraries of GPUs that only vLLM's own engine uses."""

import json
import tempfile
from pathlib import Path

from clients import trials
from clients.trials import command, trial

REQUESTS, TOKENS = 10, 16


def bench(backend: str, endpoint: str) -> str:
    with tempfile.TemporaryDirectory() as folder:
        where = ("--backend", backend, "--base-url", trials.base(), "--endpoint", endpoint)
        model = ("--model", trials.model(), "--tokenizer", trials.model_folder())
        load = ("--dataset-name", "random", "--random-input-len", "32", "--random-output-len", str(TOKENS))
        many = ("--num-prompts", str(REQUESTS), "--max-concurrency", "4", "--ignore-eos", "--temperature", "0")
        save = ("--save-result", "--result-dir", folder, "--result-filename", "result.json")
        command("vllm", "bench", "serve", *where, *model, *load, *many, *save)
        found = json.loads((Path(folder) / "result.json").read_text())
    assert (found["completed"], found["total_output_tokens"]) == (REQUESTS, REQUESTS * TOKENS), found
    return f"{REQUESTS} of {REQUESTS} requests, first token after {found['median_ttft_ms']:.0f} ms (median)"


@trial("--backend openai, completions")
def completions() -> str:
    return bench("openai", "/v1/completions")


@trial("--backend openai-chat, chat completions")
def chat() -> str:
    return bench("openai-chat", "/v1/chat/completions")


if __name__ == "__main__":
    trials.main()
