"""Settings of what a step computes and how many requests wait."""

import dataclasses
from typing import ClassVar

from serving.config.field import SettingsGroup, setting


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
    max_queue: int = setting(1024, "Most requests that may wait; the server refuses further ones at once.", more_than=0)
    max_prompt_tokens: int | None = setting(
        None, "Most tokens of a prompt; the server refuses longer ones. Default: the context limit alone."
    )
