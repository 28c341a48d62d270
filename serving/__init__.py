"""A server for Mixture-of-Experts models that keeps serving when ranks die, and its clients.

>>> from serving import Client, Server

Beside the three entry points, the names here are the types that their methods take, return and raise.
"""

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
from serving.version import version as _version

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
