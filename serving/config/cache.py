"""Settings of the KV cache."""

import dataclasses
from typing import ClassVar

from planner.inputs.cache_formats import CACHE_FORMATS
from serving.config.field import SettingsGroup, setting
from serving.errors import InvalidRequest

KV_REPLICATION = ("auto", "memory", "stream", "off")
KV_CACHE_TYPES = ("auto", *CACHE_FORMATS)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CacheSettings(SettingsGroup):
    """Size and data type of the KV cache, its reuse, and its replicas."""

    title: ClassVar[str] = "KV cache"

    page_size: int = setting(32, "Tokens of one page of the KV cache.")
    pages_per_rank: int | None = setting(
        None,
        "Pages of the KV cache in each rank. Default: enough for two contexts, or 256 tokens for each row of a step "
        "in up to 128 MiB, whichever is more.",
    )
    kv_cache_type: str = setting(
        "auto",
        "Data type of keys and values in the KV cache, its replicas and what ranks send of it; int8 and fp8 (e4m3) "
        "have a float32 scale for each head of a token, auto is float32. Answers in a narrower type differ slightly, "
        "and are as exact through every failure. States of layers that have them stay float32.",
        choices=KV_CACHE_TYPES,
    )
    prefix_caching: bool = setting(True, "Keep the pages of ended prompts for later prompts that begin the same.")
    state_snapshots: int | None = setting(
        None,
        "Snapshots of states that each rank keeps for prefix caching, of a model with layers whose context is a state. "
        "A prompt begins after the part that it has in common with an earlier one, up to a snapshot. Default: one for "
        "each request that a rank can run.",
    )
    kv_replication: str = setting(
        "auto",
        "Where replicas of the KV cache are kept, which recover it when its rank dies: memory that ranks of this "
        "machine write to (memory), memory of the front that ranks send to over their streams (stream), or nowhere "
        "(off). auto is memory if all ranks are on this machine and a quarter of its free memory holds the replicas, "
        "stream if ranks are on other hosts with arch pd, else off.",
        choices=KV_REPLICATION,
    )

    def check(self) -> None:
        """Raise InvalidRequest for a negative number of snapshots."""
        if self.state_snapshots is not None and self.state_snapshots < 0:
            raise InvalidRequest(
                f"state_snapshots is {self.state_snapshots}. Choose 0 (no prefix is shared then) or more.",
                param="state_snapshots",
            )
