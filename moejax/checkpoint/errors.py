"""Errors of reading weights from the host's copy.

StoreError
├── StoreMissing   the file does not exist
├── StoreCorrupt   the numbers differ from what was written
└── StoreRefused   others could have written to the folder
"""

Expert = tuple[int, int]
"""(MoE layer, counted by depth among MoE layers; logical expert)."""


class StoreError(RuntimeError):
    """Weights that cannot be read from the host's copy.

    `failed` holds one error for every expert of the call that could not be read; the others can.
    """

    def __init__(self, message: str, failed: "dict[Expert, StoreError] | None" = None) -> None:
        super().__init__(message)
        self.failed: dict[Expert, StoreError] = failed or {}


class StoreMissing(StoreError):
    """The store has no such weights: the file does not exist."""


class StoreCorrupt(StoreError):
    """The store has other weights than were written: truncated, damaged, or a checksum that differs."""


class StoreRefused(StoreError):
    """A folder that others could have written to."""
