"""The body of /v1/completions."""

from typing import Annotated, Any

from serving.api.http.bodies.rules import accepted, used
from serving.api.http.bodies.sampling import GenerationFields

MAX_LEGACY_LOGPROBS = 5
"""The largest `logprobs` of /v1/completions, the same as OpenAI's."""


class CompletionBody(GenerationFields, kw_only=True):
    """A request of /v1/completions."""

    prompt: Annotated[
        str | list[int | str | list[int]],
        used("Text or token ids, or a list of either: each is a prompt of its own."),
    ]
    echo: Annotated[bool | None, used("Put the prompt before the answer.")] = None
    logprobs: Annotated[
        int | None,
        used("Log-probabilities, with that many alternatives.", minimum=0, maximum=MAX_LEGACY_LOGPROBS),
    ] = None

    add_special_tokens: Annotated[Any, accepted("the tokenizer's settings decide about BOS; send token ids", True)] = (
        None
    )
    suffix: Annotated[Any, accepted("the model continues text and does not fill gaps", "")] = None
