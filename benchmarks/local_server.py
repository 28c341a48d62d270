"""A server of another program on this machine: a port for it, and whether it answers."""

import socket

import httpx

PROBE_LIMIT_S = 1.0


def free_port() -> int:
    """A port of the loopback that nobody has now."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def is_healthy(url: str) -> bool:
    """True if /health of the server at http://host:port answers within a second."""
    try:
        return httpx.get(f"{url}/health", timeout=PROBE_LIMIT_S).status_code == 200
    except httpx.HTTPError:
        return False
