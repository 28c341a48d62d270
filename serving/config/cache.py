"""Settings of the KV cache."""

import dataclasses
from typing import ClassVar

from serving.config.field import SettingsGroup, setting

KV_REPLICATION = ("auto", "memory", "stream", "off")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CacheSettings(SettingsGroup):
    """Size of the KV cache, its reuse, and its replicas."""

    title: ClassVar[str] = "KV cache"

    page_size: int = setting(32, "Tokens of one page of the KV cache.")
    pages_per_rank: int | None = setting(
        None,
        "Pages of the KV cache in each rank. Default: enough for two contexts, or 256 tokens for each row of a step "
        "in up to 128 MiB, whichever is more.",
    )
    prefix_caching: bool = setting(True, "Keep the pages of ended prompts for later prompts that begin the same.")
    kv_replication: str = setting(
        "auto",
        "Where replicas of the KV cache are kept, which recover it when its rank dies: memory that ranks of this "
        "machine write to (memory), memory of the front that ranks send to over their streams (stream), or nowhere "
        "(off). auto is memory if all ranks are on this machine and a quarter of its free memory holds the replicas, "
        "else off.",
        choices=KV_REPLICATION,
    )
