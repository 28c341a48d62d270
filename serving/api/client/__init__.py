"""Python clients of a moejax server, over gRPC.

    from serving import Client

    with Client("127.0.0.1:50051") as client:
        print(client.generate("The capital of France is", temperature=0, max_tokens=8).text)
        for chunk in client.stream("Once upon a time"):
            print(chunk.text, end="", flush=True)

`AsyncClient` has the same methods for asyncio. An error of the server arrives as the same MoejaxError class;
`serving.errors.Unreachable` means that no server answers.
"""

from serving.api.client.asynchronous import AsyncClient
from serving.api.client.base import DEFAULT_ADDRESS, HasAddress
from serving.api.client.blocking import Client
from serving.api.client.completion import CompletionOutput
from serving.api.client.options import GenerateOptions, SamplingOptions
from serving.api.client.streams import AsyncStream, Stream

__all__ = [
    "DEFAULT_ADDRESS",
    "AsyncClient",
    "AsyncStream",
    "Client",
    "CompletionOutput",
    "GenerateOptions",
    "HasAddress",
    "SamplingOptions",
    "Stream",
]
