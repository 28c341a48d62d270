"""How a step fails on one rank, and what the other ranks need of it all the same."""

import contextlib
from collections.abc import Iterator

import jax


class StaleEpoch(RuntimeError):
    """A step of an epoch that this rank is not in."""


class NonFiniteLogits(RuntimeError):
    """Rows of a step whose logits are not-a-number or infinite; nothing was committed."""

    def __init__(self, rows: list[int]) -> None:
        super().__init__(f"the logits of {len(rows)} rows are not finite")
        self.rows = rows


class OwnFailure(RuntimeError):
    """An error of this rank alone after the exchanges of a step, in all of which it took part; nothing was
    committed."""

    def __init__(self, cause: Exception) -> None:
        super().__init__(str(cause))
        self.cause = cause


OWN_ERRORS = (jax.errors.JaxRuntimeError, ValueError)
"""Errors of a rank's own programs after which it goes on; every other one ends it."""


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Work of a rank alone, after all exchanges of its step. Raises OwnFailure for an error in it."""
    try:
        yield
    except OWN_ERRORS as error:
        raise OwnFailure(error) from error
