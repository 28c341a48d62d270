"""Hosts the coordination service of one generation, so that any rank may die. Imports jaxlib, not jax.

    python -m moejax.runtime.coordinator RANKS PROCESSES HOST

prints its port, then serves there. It ends when its standard input closes, also before it serves.

The first RANKS of the PROCESSES process ids are ranks that enter at once and wait for one another; this process stands
in for the others. Where RANKS is 0 it stands in for all before it prints its port, so that each rank can enter under an
id of 1 or above, by itself: nobody waits for a rank that dies meanwhile (docs/decisions/0004).
"""

import os
import signal
import socket
import sys
import threading

from moejax.runtime.distributed import host_coordination_service, stand_in


def main() -> None:
    """Serve one generation."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # the front gets it too, drains first and then ends this process
    ending = threading.Thread(target=_end_with_input, daemon=True)
    ending.start()
    ranks, processes, host = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    with socket.socket() as probe:
        probe.bind((host, 0))
        port = probe.getsockname()[1]
    _service = host_coordination_service(processes, port, host)  # lives as long as it is referred to
    here = "127.0.0.1" if host == "0.0.0.0" else host
    standing_in = stand_in(f"{here}:{port}", range(ranks, processes), processes)
    for thread in () if ranks else standing_in:
        thread.join()
    print(port, flush=True)
    ending.join()


def _end_with_input() -> None:
    """End this process when its front closes its standard input, or is gone."""
    sys.stdin.read()
    os._exit(0)  # after an orderly shutdown the runtime of every rank would end that rank


if __name__ == "__main__":
    main()
