"""Settings of how requests outlive the front."""

import dataclasses
from typing import ClassVar

from serving.config.field import SettingsGroup, setting


@dataclasses.dataclass(frozen=True, kw_only=True)
class DurabilitySettings(SettingsGroup):
    """The journal of requests, and what happens when the front dies or stops."""

    title: ClassVar[str] = "Journal and restarts of the front"

    supervise: bool = setting(True, "Start the front again when it dies, and continue its requests.")
    journal: str | None = setting(
        None,
        "Folder of the journal from which a restarted front continues requests; off keeps none. Default: a temporary "
        "folder if the front is supervised.",
    )
    journal_sync_s: float = setting(
        1.0,
        "Most seconds until the disk has a record of the journal; the death of the machine can lose records of so many "
        "seconds.",
        at_least=0.0,
    )
    resume_s: float = setting(
        60.0, "Seconds after its end for which a client can still resume an answer.", at_least=0.0
    )
    grace_s: float = setting(30.0, "Most seconds that a stopping server waits for running requests.")
