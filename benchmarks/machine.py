"""Describes the machine and the time of a measurement."""

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


def high_water() -> int:
    """The peak memory of this process, in bytes."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM"))
    return int(line.split()[1]) << 10


def read_bytes() -> int:
    """Bytes that this process has read so far, including files that were in memory."""
    return int(Path("/proc/self/io").read_text().split("\n")[0].split()[1])
