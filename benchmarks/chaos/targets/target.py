"""A server under trial."""

import abc
import types
from collections.abc import Mapping, Sequence
from typing import Any, Self


class Target(abc.ABC):
    """A running server that speaks the OpenAI API, and its processes by name. Used as a context manager."""

    url: str
    """http://host:port, without /v1."""
    model: str
    """The model's name in requests."""
    about: str
    """The server's name and version."""
    setup: str
    """How it was started, in words, for the table."""
    extra_body: Mapping[str, Any] = types.MappingProxyType({"ignore_eos": True})
    """Fields of its requests that the official API does not have."""

    @classmethod
    @abc.abstractmethod
    def start(cls, options: Sequence[str]) -> Self:
        """Start the server; `options` are more flags of its own. Returns when it answers."""

    @property
    @abc.abstractmethod
    def selectors(self) -> Sequence[str]:
        """Names of processes that a fault can hit."""

    @abc.abstractmethod
    def process(self, selector: str) -> int:
        """The id of the process that a selector names now. Raises LookupError when there is none."""

    @abc.abstractmethod
    def whole(self) -> bool:
        """True if the server is as it was before the last fault, replacements of processes included."""

    @property
    @abc.abstractmethod
    def restarts(self) -> int:
        """How often the whole server was started again since `start`."""

    @abc.abstractmethod
    def stop(self) -> None:
        """End the server and all of its processes."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.stop()
