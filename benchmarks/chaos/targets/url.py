"""A server that runs already, and that somebody else starts again when it ends."""

import types
from collections.abc import Mapping, Sequence
from typing import Any, Self

import httpx

from benchmarks.chaos.processes import matching
from benchmarks.chaos.targets.target import Target


class Url(Target):
    """Any OpenAI server on this machine or another. A selector is a process id, or text of a process's command."""

    about = "a running server"
    setup = "started by others"
    extra_body: Mapping[str, Any] = types.MappingProxyType({})

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        self.model = self._models()[0]
        self.about = self.url

    @classmethod
    def start(cls, options: Sequence[str]) -> Self:
        """Connect; the only option is the address. Raises RuntimeError when no model is served there."""
        return cls(options[0])

    @property
    def selectors(self) -> Sequence[str]:
        """None by name."""
        return ()

    def process(self, selector: str) -> int:
        """The process with this id, or the first whose command line contains this text."""
        found = [int(selector)] if selector.isdigit() else matching(selector)
        if not found:
            raise LookupError(f"no process of this machine has {selector!r} in its command line")
        return found[0]

    def whole(self) -> bool:
        """True if it lists its models."""
        try:
            return bool(self._models())
        except RuntimeError:
            return False

    @property
    def restarts(self) -> int:
        """Unknown here, and counted as none."""
        return 0

    def stop(self) -> None:
        """Others started it."""

    def _models(self) -> list[str]:
        try:
            answer = httpx.get(f"{self.url}/v1/models", timeout=5.0)
            return [str(model["id"]) for model in answer.raise_for_status().json()["data"]]
        except (httpx.HTTPError, ValueError, LookupError, TypeError) as error:
            raise RuntimeError(f"{self.url}/v1/models does not answer as OpenAI's: {error}") from error
