"""A server for Mixture-of-Experts models that keeps serving when ranks die, and its clients.

>>> from serving import Client, Server

Beside the three entry points, the names here are the types that their methods take, return and raise.

A name is imported when it is first used: every process of a server imports this package, and a rank or an edge needs
few of them.
"""

import importlib
from typing import TYPE_CHECKING, Any

from serving.version import version as _version

if TYPE_CHECKING:
    from serving.api.client import (
        AsyncClient,
        AsyncStream,
        Client,
        CompletionOutput,
        GenerateOptions,
        SamplingOptions,
        Stream,
    )
    from serving.auth.tls import ClientTls
    from serving.config import Settings
    from serving.core.answers import Chunk, Complete, PromptScores
    from serving.core.prompts import Conversation, Prompt
    from serving.errors import (
        Cancelled,
        Conflict,
        DeadlineExceeded,
        Draining,
        Internal,
        InvalidRequest,
        MoejaxError,
        NoCapacity,
        NoTokenAllowed,
        NotPermitted,
        PoisonRequest,
        PromptTooLong,
        QueueFull,
        StartError,
        Unauthenticated,
        UnknownRequest,
        Unreachable,
    )
    from serving.protocol.events import Event, EventKind
    from serving.protocol.prepared_model import ModelInfo
    from serving.protocol.sampling import SamplingParams, StructuredOutputs
    from serving.protocol.status import EdgeStatus, LossCost, LossForecast, PoolStatus, RankStatus, Status
    from serving.server import Server
    from serving.text.answer_parts import InvalidToolCall, ToolCall
    from serving.text.tokenizer import Message

__version__ = _version()
__all__ = [
    "AsyncClient",
    "AsyncStream",
    "Cancelled",
    "Chunk",
    "Client",
    "ClientTls",
    "Complete",
    "CompletionOutput",
    "Conflict",
    "Conversation",
    "DeadlineExceeded",
    "Draining",
    "EdgeStatus",
    "Event",
    "EventKind",
    "GenerateOptions",
    "Internal",
    "InvalidRequest",
    "InvalidToolCall",
    "LossCost",
    "LossForecast",
    "Message",
    "ModelInfo",
    "MoejaxError",
    "NoCapacity",
    "NoTokenAllowed",
    "NotPermitted",
    "PoisonRequest",
    "PoolStatus",
    "Prompt",
    "PromptScores",
    "PromptTooLong",
    "QueueFull",
    "RankStatus",
    "SamplingOptions",
    "SamplingParams",
    "Server",
    "Settings",
    "StartError",
    "Status",
    "Stream",
    "StructuredOutputs",
    "ToolCall",
    "Unauthenticated",
    "UnknownRequest",
    "Unreachable",
]

_MODULES = {
    "serving.api.client": (
        "AsyncClient",
        "AsyncStream",
        "Client",
        "CompletionOutput",
        "GenerateOptions",
        "SamplingOptions",
        "Stream",
    ),
    "serving.auth.tls": ("ClientTls",),
    "serving.config": ("Settings",),
    "serving.core.answers": ("Chunk", "Complete", "PromptScores"),
    "serving.core.prompts": ("Conversation", "Prompt"),
    "serving.errors": (
        "Cancelled",
        "Conflict",
        "DeadlineExceeded",
        "Draining",
        "Internal",
        "InvalidRequest",
        "MoejaxError",
        "NoCapacity",
        "NoTokenAllowed",
        "NotPermitted",
        "PoisonRequest",
        "PromptTooLong",
        "QueueFull",
        "StartError",
        "Unauthenticated",
        "UnknownRequest",
        "Unreachable",
    ),
    "serving.protocol.events": ("Event", "EventKind"),
    "serving.protocol.prepared_model": ("ModelInfo",),
    "serving.protocol.sampling": ("SamplingParams", "StructuredOutputs"),
    "serving.protocol.status": ("EdgeStatus", "LossCost", "LossForecast", "PoolStatus", "RankStatus", "Status"),
    "serving.server": ("Server",),
    "serving.text.answer_parts": ("InvalidToolCall", "ToolCall"),
    "serving.text.tokenizer": ("Message",),
}
"""Names by the module that defines them."""
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    """The public name, or the package that has some, imported at its first use. Raises AttributeError."""
    if any(module.split(".")[1] == name for module in _MODULES):
        return importlib.import_module(f"{__name__}.{name}")
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value = getattr(importlib.import_module(_MODULE_OF[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
