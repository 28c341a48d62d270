"""Ranks started by Ray (optional extra `ray`): imported only when a server is told to.

For each rank there is one actor that keeps a place (`moejax rank --join`) on the node that Ray puts it on. Where it
runs, and that it runs again elsewhere when its node dies, is Ray's work; all that is ours is the command it holds on
to. What happens between the front and the place is the same as for any host that joins.
"""

import contextlib
import os
import subprocess
import sys
import tempfile
from typing import Any

import ray  # pyright: ignore[reportMissingImports]
from ray.util import get_node_ip_address  # pyright: ignore[reportMissingImports]

from serving.config import Settings, is_loopback
from serving.errors import StartError
from serving.orphans import die_with_parent

HANDED_ON = ("MOEJAX_CA", "MOEJAX_CLIENT_CERT", "MOEJAX_CLIENT_KEY", "MOEJAX_CACHE", "JAX_PLATFORMS")
"""Variables of the front that its ranks get: files of TLS, which each node has at the same place, and the like."""
HOST_LABEL, RACK_LABEL = "moejax.dev/host", "moejax.dev/rack"
"""Labels of a Ray node. Without the first, each node is a host of its own."""


class Keeping:
    """What an actor does: hold on to a process that keeps a place, and never end before it."""

    def keep(self, arguments: list[str], secret: str) -> int:
        """Run `moejax rank` with these arguments; its exit status."""
        labels = ray.get_runtime_context().get_node_labels()
        host = labels.get(HOST_LABEL) or f"node-{ray.get_runtime_context().get_node_id()[:12]}"
        with tempfile.NamedTemporaryFile("w") as token:  # for its owner only
            token.write(secret)
            token.flush()
            command = [sys.executable, "-m", "serving", "rank", "--host", host, "--token-file", token.name]
            command += ["--rack", labels.get(RACK_LABEL, ""), *arguments]
            return subprocess.call(command, preexec_fn=die_with_parent, stdin=subprocess.DEVNULL)


class Cluster:
    """The actors of one server; `stop` ends them all."""

    def __init__(self, actors: list[Any]) -> None:
        self._actors = actors

    def stop(self) -> None:
        """End every actor, and leave the cluster."""
        for actor in self._actors:
            with contextlib.suppress(Exception):  # it may have ended, or the cluster be gone
                ray.kill(actor)
        ray.shutdown()


def start(settings: Settings, address: str, secret: str) -> Cluster:
    """Ask Ray for one place for each rank, which is to dial `address`. Returns before they are there. Raises StartError
    when there is no such cluster."""
    variables = {name: os.environ[name] for name in HANDED_ON if name in os.environ}
    try:
        ray.init(
            address=settings.ray_address,
            log_to_driver=False,
            configure_logging=False,
            include_dashboard=None,
            namespace="moejax",
            runtime_env={"env_vars": variables},
        )
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise StartError(
            f"there is no Ray cluster at {settings.ray_address}: {error}. `ray start --head` makes one; --ray-address "
            "says where it is."
        ) from None
    host, _, port = address.rpartition(":")
    if host == "0.0.0.0":
        host = get_node_ip_address()
    arguments = ["--join", f"{host}:{port}"]
    arguments += ["--plaintext"] if settings.rank_tls_cert is None and not is_loopback(host) else []
    on_gpu = "cuda" in os.environ.get("JAX_PLATFORMS", "")
    options = {"num_cpus": 1, "num_gpus": 1 if on_gpu else 0, "scheduling_strategy": "SPREAD"}
    actor = ray.remote(Keeping).options(max_restarts=-1, max_task_retries=-1, **options)
    actors = [actor.remote() for _ in range(settings.ranks)]
    for each in actors:
        each.keep.remote(arguments, secret)
    return Cluster(actors)
