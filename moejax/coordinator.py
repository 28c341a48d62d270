"""Hosts the coordination service of one generation, so that any rank may die. Imports jaxlib, not jax.

python -m moejax.coordinator RANKS SEATS      prints its port, then serves until its standard input closes

The first RANKS of the SEATS processes are ranks at the start; the others are kept free for replacements.
"""

import signal
import socket
import sys

from moejax.world import host_coordination_service, keep_seats


def main() -> None:
    """Serve one generation."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # meant for the front, which drains first and then ends this
    ranks, seats = map(int, sys.argv[1:3])
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    service = host_coordination_service(seats, port)
    print(port, flush=True)
    keep_seats(f"127.0.0.1:{port}", range(ranks, seats), seats)
    sys.stdin.read()
    del service


if __name__ == "__main__":
    main()
