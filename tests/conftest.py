"""How JAX runs in tests: as in a rank, on one thread per device, with four devices for meshes inside the process."""

import os

import hypothesis
import jaxtyping
import pytest

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["NPROC"] = "1"
os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false --xla_force_host_platform_device_count=4"
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
# Compiles of the tests themselves are kept between runs; the server's own are not made this way.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", os.path.expanduser("~/.cache/moejax/tests-xla"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")

# The machine may be shared: laws are asserted, never times.
hypothesis.settings.register_profile("unhurried", deadline=None)
hypothesis.settings.load_profile("unhurried")

# Shapes and kinds of numbers in annotations are checked at every call.
jaxtyping.install_import_hook(
    [f"moejax.{name}" for name in ("exchange", "experts", "layers", "router", "sampling")], "beartype.beartype"
)


@pytest.fixture
def anyio_backend() -> str:
    """The server is asyncio's, also where another event loop is installed."""
    return "asyncio"
