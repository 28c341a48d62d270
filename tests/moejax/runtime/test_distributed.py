"""The hooks into JAX's distributed runtime."""

import jax
import pytest

from moejax.runtime.distributed import is_exchange_failure


@pytest.mark.parametrize(
    ("text", "failed"),
    [
        ("ABORTED: the exchange was aborted", True),
        ("ABORTED: the exchange waited too long for the others", True),
        ("UNKNOWN: Gloo all-to-all failed: Connection closed by peer [127.0.0.1]:4711", True),
        ("RESOURCE_EXHAUSTED: Out of memory allocating 4096 bytes", False),
        ("INVALID_ARGUMENT: an exchange of 8 bytes between 3 ranks, with room for 4", False),
    ],
)
def test_only_errors_of_connections_and_of_waiting_are_failures_of_an_exchange(text: str, failed: bool) -> None:
    assert is_exchange_failure(jax.errors.JaxRuntimeError(text)) == failed
    assert not is_exchange_failure(ValueError(text))
