"""The run delay of a process: how long its threads were ready to run and waited for a processor."""

import os

_NANOSECONDS = 1e-9


def run_delay_s(pid: int) -> float | None:
    """Seconds that the threads of a process of this machine have waited for a processor since each began, in sum: the
    second field of /proc/PID/task/TID/schedstat (Documentation/scheduler/sched-stats.rst). Threads that have ended are
    not in it. None when the process is gone, or the kernel does not count."""
    waited, counted = 0, False
    try:
        for thread in os.listdir(f"/proc/{pid}/task"):
            try:
                with open(f"/proc/{pid}/task/{thread}/schedstat", "rb") as file:
                    waited += int(file.read().split()[1])
            except (OSError, IndexError):
                continue  # this thread has just ended
            counted = True
    except OSError:
        return None
    return waited * _NANOSECONDS if counted else None
