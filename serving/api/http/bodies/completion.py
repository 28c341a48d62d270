"""The body of /v1/completions."""

from typing import Annotated, Any

from serving.api.http.bodies.rules import accepted, used
from serving.api.http.bodies.sampling import GenerationFields
from serving.text.validation import MAX_TOP_LOGPROBS


class CompletionBody(GenerationFields, kw_only=True):
    """A request of /v1/completions."""

    prompt: Annotated[
        str | list[int | str | list[int]],
        used("Text or token ids, or a list of either: each is a prompt of its own."),
    ]
    echo: Annotated[bool | None, used("Put the prompt before the answer.")] = None
    add_special_tokens: Annotated[
        bool | None, used("With false, no BOS is put before a text, as the tokenizer's settings may want.")
    ] = None
    logprobs: Annotated[
        int | None,
        used("Log-probabilities, with that many alternatives.", minimum=0, maximum=MAX_TOP_LOGPROBS),
    ] = None

    suffix: Annotated[Any, accepted("the model continues text and does not fill gaps", "")] = None
