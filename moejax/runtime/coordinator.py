"""Hosts the coordination service of one generation, so that any rank may die. Imports jaxlib, not jax.

python -m moejax.coordinator RANKS SEATS HOST      prints its port, then serves there until its standard input closes

The first RANKS of the SEATS processes are ranks at the start; the others are kept free for replacements.
"""

import os
import signal
import socket
import sys

from moejax.world import host_coordination_service, keep_seats


def main() -> None:
    """Serve one generation."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # meant for the front, which drains first and then ends this
    ranks, seats, host = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    with socket.socket() as probe:
        probe.bind((host, 0))
        port = probe.getsockname()[1]
    _service = host_coordination_service(seats, port, host)  # lives as long as it is referred to
    print(port, flush=True)
    here = "127.0.0.1" if host == "0.0.0.0" else host
    keep_seats(f"{here}:{port}", range(ranks, seats), seats)
    sys.stdin.read()
    os._exit(0)  # an orderly end would be told to the ranks, whose runtime ends them then; they can do without


if __name__ == "__main__":
    main()
