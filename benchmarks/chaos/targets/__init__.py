"""The servers that can be tried, one file each; docs/chaos.md says how to add one."""

from benchmarks.chaos.targets.llama_cpp import LlamaCpp
from benchmarks.chaos.targets.moejax import Moejax
from benchmarks.chaos.targets.target import Target
from benchmarks.chaos.targets.url import Url
from benchmarks.chaos.targets.vllm import Vllm

TARGETS: dict[str, type[Target]] = {"moejax": Moejax, "vllm": Vllm, "llama.cpp": LlamaCpp}
"""By the name after --target; anything else is the address of a running server (`Url`)."""

__all__ = ["TARGETS", "LlamaCpp", "Moejax", "Target", "Url", "Vllm"]
