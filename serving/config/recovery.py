"""Settings of what happens after ranks are lost."""

import dataclasses
from typing import ClassVar

from serving.config.field import SettingsGroup, setting

ON_LOST_EXPERT = ("auto", "wait", "mask")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecoverySettings(SettingsGroup):
    """How losses of ranks are prepared for, and the response to a loss."""

    title: ClassVar[str] = "Recovery"

    lattice_depth: int = setting(
        3, "Most ranks lost together for which the server compiles and connects the remaining mesh in advance."
    )
    on_lost_expert: str = setting(
        "wait",
        "What to do while an expert that no rank holds is reloaded: wait for it (wait), serve without it (mask), or "
        "decide by its share of the traffic (auto).",
        choices=ON_LOST_EXPERT,
    )
    lost_expert_bound: float = setting(
        0.05,
        "Share of the expert traffic, 0 to 1, below which lost experts are masked, with on-lost-expert auto.",
        at_least=0.0,
    )
    parity: int = setting(
        0,
        "Number of experts, each on another rank, that share one XOR parity in the host memory of a further rank. It "
        "restores a lost expert without the weight store. 0 keeps no parity.",
    )
    poison_limit: int = setting(
        2,
        "Number of ranks that may fail of themselves (an exception, a crash) while one request runs, the last one "
        "while it runs alone, before the request ends with an error.",
        at_least=2,
    )
    certificate: str | None = setting(
        None,
        "File of `moejax plan certify` whose terms are checked again whenever the plan changes; the status, a metric "
        "and the dashboard show whether it still holds.",
    )
    certificate_key: str | None = setting(
        None, "File with the key that the certificate has to be signed with; without it the signature is not checked."
    )
    restart: bool = setting(True, "Start a replacement for each rank that died.")
