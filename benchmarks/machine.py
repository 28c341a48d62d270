"""Where and when figures were measured."""

import datetime
import importlib.metadata
import os
import platform
from pathlib import Path


def machine() -> dict[str, str | int | float]:
    """Cores, processor, versions, load and date."""
    cpus = Path("/proc/cpuinfo")
    lines = cpus.read_text().splitlines() if cpus.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "cores": len(os.sched_getaffinity(0)),
        "processor": names[0] if names else platform.processor(),
        "python": platform.python_version(),
        "jax": importlib.metadata.version("jax"),
        "load_before": round(os.getloadavg()[0], 1),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
