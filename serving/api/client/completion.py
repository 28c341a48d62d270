"""One complete output of a request, put together from the items of its stream."""

import dataclasses
from collections.abc import Sequence

from serving.core.answers import Chunk, Complete, PromptScores
from serving.errors import Internal
from serving.protocol.sampling import TopLogprobs
from serving.text.answer_parts import InvalidToolCall, ToolCall


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompletionOutput:
    """One complete output. `reason` is stop, length or tool_calls; `epochs` are the epochs in which its tokens were
    computed. `top` and the log-probabilities of the prompt (without its first token) are there if they were
    requested."""

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    reason: str
    prompt_tokens: int
    completion_tokens: int
    epochs: tuple[int, ...]
    seed: int
    weights_versions: tuple[tuple[str, int], ...] = ()
    """The weights that computed its tokens: the label of each version, and how many tokens in a row, in order."""
    cached_tokens: int = 0
    accepted_drafts: int = 0
    """Tokens that a draft had guessed."""
    top: tuple[TopLogprobs, ...] = ()
    prompt_logprobs: tuple[float, ...] = ()
    prompt_top: tuple[TopLogprobs, ...] = ()
    calls: tuple[ToolCall, ...] = ()
    """Tool calls, in the output of a `Conversation` with tools."""
    invalid_calls: tuple[InvalidToolCall, ...] = ()
    """Calls that cannot be carried out, for example because the answer was cut within them."""
    reasoning: str = ""
    """The text that a reasoning model wrote before its answer to a conversation."""


def completion_outputs(
    chunks: Sequence[Chunk], ends: Sequence[Complete], scores: Sequence[PromptScores]
) -> list[CompletionOutput]:
    """One output for each `Complete`. Raises Internal when there is none."""
    if not ends:
        raise Internal("the server ended the stream without a reason.")
    return [
        _completion_output(
            [chunk for chunk in chunks if chunk.choice == end.choice],
            end,
            [each for each in scores if each.choice == end.choice],
        )
        for end in ends
    ]


def _completion_output(chunks: Sequence[Chunk], end: Complete, scores: Sequence[PromptScores]) -> CompletionOutput:
    return CompletionOutput(
        text="".join(chunk.text for chunk in chunks),
        token_ids=tuple(token for chunk in chunks for token in chunk.token_ids),
        logprobs=tuple(logprob for chunk in chunks for logprob in chunk.logprobs),
        reason=end.reason,
        prompt_tokens=end.prompt_tokens,
        completion_tokens=end.completion_tokens,
        epochs=end.epochs,
        weights_versions=end.weights_versions,
        seed=end.seed,
        cached_tokens=end.cached_tokens,
        accepted_drafts=end.accepted_drafts,
        top=tuple(top for chunk in chunks for top in chunk.top),
        prompt_logprobs=tuple(logprob for each in scores for logprob in each.logprobs),
        prompt_top=tuple(top for each in scores for top in each.top),
        calls=tuple(call for chunk in chunks for call in chunk.calls),
        invalid_calls=tuple(call for chunk in chunks for call in chunk.invalid_calls),
        reasoning="".join(chunk.reasoning for chunk in chunks),
    )
