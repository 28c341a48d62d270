"""How JAX runs in tests: as in a rank, on one thread per device, with four devices for meshes inside the process."""

import os

import hypothesis
import jaxtyping
import pytest

from moejax.runtime.distributed import CPU_FLAGS
from tests.support import late_events, typechecker

pytest.register_assert_rewrite("tests.support.step_laws")
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["NPROC"] = "1"
os.environ["XLA_FLAGS"] = " ".join(
    (*CPU_FLAGS, "--xla_cpu_multi_thread_eigen=false", "--xla_force_host_platform_device_count=4")
)
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
# Compiles of the tests themselves are kept between runs; the server's own are not made this way.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", os.path.expanduser("~/.cache/moejax/tests-xla"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")

# The machine may be shared: laws are asserted, never times. The examples of a test are the same in every run, so that a
# change is judged by what it changes; `scripts/soak` looks for new ones.
hypothesis.settings.register_profile("same", deadline=None, derandomize=True)
hypothesis.settings.register_profile("quick", deadline=None, derandomize=True, max_examples=10)
hypothesis.settings.register_profile("soak", deadline=None)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))

late_events.drop_late_events()

# Shapes and kinds of numbers in annotations are checked at every call.
jaxtyping.install_import_hook(typechecker.checked_modules(), f"{typechecker.__name__}.check")


THOROUGH = (
    "benchmarks/test_gpu_benchmark.py",
    "benchmarks/test_load.py",
    "deploy/test_wheel.py",
    "moejax/checkpoint/families/test_array_sources.py",
    "moejax/checkpoint/test_checkpoint.py",
    "moejax/checkpoint/test_convert.py",
    "moejax/checkpoint/test_host_copies.py",
    "moejax/checkpoint/test_host_store.py",
    "moejax/checkpoint/test_published_store.py",
    "test_published_folders.py",
    "test_compile_ahead.py",
    "test_cpu.py",
    "test_decoder.py",
    "test_decoder_latents.py",
    "test_decoder_states.py",
    "test_decoder_windows.py",
    "test_disaggregated.py",
    "test_examples.py",
    "test_expert_parity.py",
    "test_failover.py",
    "test_front_death.py",
    "test_kv_restoration.py",
    "test_openapi_fuzz.py",
    "test_pallas.py",
    "test_shared_memory.py",
    "test_smollm2.py",
    "test_tensor_parallel.py",
    "moejax/tools/test_train.py",
    "planner/failures/test_loss_model.py",
    "serving/dashboard/test_dashboard.py",
    "serving/edges/test_remote_backend.py",
    "serving/engine/test_fairness.py",
    "serving/launch/test_host_agent.py",
    "serving/test_server.py",
    "serving/text/test_tokenizer_formats.py",
)
"""Ends of the paths of test files that take the most time, or that start real servers or a browser;
`scripts/test --quick` leaves them out."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests that `scripts/test --quick` leaves out."""
    for item in items:
        if item.path.as_posix().endswith(tuple(f"/{name}" for name in THOROUGH)):
            item.add_marker(pytest.mark.thorough)


@pytest.fixture
def anyio_backend() -> str:
    """The server is asyncio's, also where another event loop is installed."""
    return "asyncio"
