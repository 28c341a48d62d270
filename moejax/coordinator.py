"""Hosts the coordination service of one generation, so that any rank may die. Imports jaxlib, not jax.

python -m moejax.coordinator RANKS      prints its port, then serves until its standard input closes
"""

import signal
import socket
import sys

from moejax.world import host_coordination_service


def main() -> None:
    """Serve one generation."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # meant for the front, which drains first and then ends this
    ranks = int(sys.argv[1])
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    service = host_coordination_service(ranks, port)
    print(port, flush=True)
    sys.stdin.read()
    del service


if __name__ == "__main__":
    main()
