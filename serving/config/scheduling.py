"""Settings of what a step computes and how many requests wait."""

import dataclasses
from typing import ClassVar

from planner.inputs.workload import MAX_DRAFTS
from serving.config.field import SettingsGroup, setting
from serving.errors import InvalidRequest

MODEL_DRAFTS = 2
"""Tokens that a layer of multi-token prediction drafts unless the settings say how many. Each is one more pass over
that layer in a step."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SchedulingSettings(SettingsGroup):
    """Which steps are compiled, what goes into a step, and how long the queue may be. With no `buckets` (auto) the
    server chooses them from counts of earlier steps."""

    title: ClassVar[str] = "Scheduling"

    buckets: tuple[tuple[int, int], ...] = setting(
        ((2, 0), (8, 0), (32, 0), (8, 2), (32, 8)),
        "Step shapes to compile, each as decode rows,prefill tiles of 32 tokens (for example 2,0;8,2). auto: choose "
        "them from the steps that earlier servers of this model counted.",
    )
    tiles_while_decoding: int = setting(
        2,
        "Most prefill tiles (32 tokens each) in a step while decoding requests outnumber those in prefill; grows with "
        "the number of decode rows.",
    )
    lookahead: bool = setting(
        True, "Schedule and send a step while the one before it runs, instead of waiting for its results."
    )
    speculate: str = setting(
        "off",
        "Draft the next tokens of a request, and check several in one step: ngram repeats what followed the same words "
        "earlier in the request; mtp asks the model's own layer of multi-token prediction (DeepSeek-V3, GLM-4.x, "
        "tiny). No token changes. A request can say otherwise.",
        choices=("off", "ngram", "mtp"),
    )
    draft_tokens: int | None = setting(
        None,
        "Drafts of a request in each step, 1 to 15. Default: as many as its earlier drafts and the load make "
        "worth while, at most 2 with mtp. The layer of mtp runs only after steps where its drafts are worth the wait, "
        "and after every step if a number is given.",
    )
    max_queue: int = setting(1024, "Most requests that may wait; the server refuses further ones at once.", more_than=0)
    max_prompt_tokens: int | None = setting(
        None, "Most tokens of a prompt; the server refuses longer ones. Default: the context limit alone."
    )

    @property
    def model_drafts(self) -> int:
        """Tokens that the model's own layer drafts for each request in a step; 0 unless it drafts."""
        return (self.draft_tokens or MODEL_DRAFTS) if self.speculate == "mtp" else 0

    def check(self) -> None:
        """Raise InvalidRequest for a number of drafts out of range."""
        if self.draft_tokens is not None and not 1 <= self.draft_tokens <= MAX_DRAFTS:
            raise InvalidRequest(
                f"draft_tokens is {self.draft_tokens}. Choose 1 to {MAX_DRAFTS}, or leave it out.", param="draft_tokens"
            )
