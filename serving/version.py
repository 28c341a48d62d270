"""Which moejax this is."""

import importlib.metadata


def version() -> str:
    """The installed version of moejax; "source" when it runs from a checkout that is not installed."""
    try:
        return importlib.metadata.version("moejax")
    except importlib.metadata.PackageNotFoundError:
        return "source"
