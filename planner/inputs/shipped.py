"""The files that ship with moejax: configs/ and models/tiny/, in a checkout or in an installed wheel."""

from pathlib import Path

_PLANNER = Path(__file__).resolve().parents[1]


def shipped(path: str) -> Path:
    """The place of a shipped file or folder, given relative to the repository (`configs/clusters`, `models/tiny`).

    In a checkout, or an editable install of one, that is the file itself; a wheel holds a copy (`setup.py`).
    """
    checkout = _PLANNER.parent
    root = checkout if (checkout / "configs" / "clusters").is_dir() else _PLANNER / "shipped"
    return root / path
