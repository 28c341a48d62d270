"""Host agents started by Ray (optional extra `ray`): imported only when the settings ask for it.

One Ray actor for each rank runs a host agent (`moejax rank --join`) on the node where Ray places the actor. Ray places
it, and places it again when its node dies. What happens between the front and the agent is the same as on any joined
host.
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
from serving.launch.process import die_with_parent

FORWARDED_VARIABLES = ("MOEJAX_CA", "MOEJAX_CLIENT_CERT", "MOEJAX_CLIENT_KEY", "MOEJAX_CACHE", "JAX_PLATFORMS")
"""Environment variables that agents get from the front, such as paths of TLS files, which are the same on each node."""
HOST_LABEL, RACK_LABEL = "moejax.dev/host", "moejax.dev/rack"
"""Labels of a Ray node. A node without the first one is a host of its own."""


class RankActor:
    """The class of the Ray actors: it runs a host agent, and never ends before it."""

    def keep(self, arguments: list[str], secret: str) -> int:
        """Run `moejax rank` with these arguments and return its exit status."""
        labels = ray.get_runtime_context().get_node_labels()
        host = labels.get(HOST_LABEL) or f"node-{ray.get_runtime_context().get_node_id()[:12]}"
        with tempfile.NamedTemporaryFile("w") as token:  # readable for its owner only
            token.write(secret)
            token.flush()
            command = [sys.executable, "-m", "serving", "rank", "--host", host, "--token-file", token.name]
            command += ["--rack", labels.get(RACK_LABEL, ""), *arguments]
            return subprocess.call(command, preexec_fn=die_with_parent, stdin=subprocess.DEVNULL)


class RankActors:
    """The actors of one server."""

    def __init__(self, actors: list[Any]) -> None:
        self._actors = actors

    def stop(self) -> None:
        """End every actor, and disconnect from Ray."""
        for actor in self._actors:
            with contextlib.suppress(Exception):  # the actor may have ended, or the cluster may be gone
                ray.kill(actor)
        ray.shutdown()


def start(settings: Settings, address: str, secret: str) -> RankActors:
    """Ask Ray for one host agent for each rank. The agents dial `address` with the join token `secret`. Returns before
    they have been started. Raises StartError when Ray cannot be reached."""
    variables = {name: os.environ[name] for name in FORWARDED_VARIABLES if name in os.environ}
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
    actor_class = ray.remote(RankActor).options(max_restarts=-1, max_task_retries=-1, **options)
    actors = [actor_class.remote() for _ in range(settings.ranks)]
    for actor in actors:
        actor.keep.remote(arguments, secret)
    return RankActors(actors)
