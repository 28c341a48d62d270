"""All errors that the planner raises.

PlannerError
├── InputError        a file, an option or a value of the caller is wrong   INVALID_ARGUMENT
│   ├── InvalidPlan   a plan contradicts itself                               INVALID_ARGUMENT
│   └── UnknownKey    a name in a file or an option that is none              INVALID_ARGUMENT
└── NoFeasiblePlan    the input is right, but the ranks alive cannot hold the model  UNAVAILABLE

`status` is the gRPC status code a server answers with when the error reaches it.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class PlannerError(Exception):
    """Base of all planner errors."""

    status = "INTERNAL"


class InputError(PlannerError, ValueError):
    """A file, option or value from the caller that cannot be used."""

    status = "INVALID_ARGUMENT"


class InvalidPlan(InputError):
    """A plan whose parts contradict each other."""


class UnknownKey(InputError):
    """A name in a file or an option that the planner does not know."""


class NoFeasiblePlan(PlannerError):
    """The ranks alive cannot hold the model; the text says what is missing."""

    status = "UNAVAILABLE"


def unknown_key(key: str, known: Iterable[str], where: str) -> UnknownKey:
    """The error for `key`, naming the nearest of the `known` keys."""
    known = sorted(known)
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    hint = f"Did you mean {near[0]!r}?" if near else f"Known keys: {', '.join(known)}."
    return UnknownKey(f"unknown key {key!r} in {where}. {hint}")


def unknown_value(value: str, known: Iterable[str], what: str) -> InputError:
    """An InputError that reads "`value` is `what` (the `known` values)", naming the nearest of them."""
    known = sorted(known)
    near = difflib.get_close_matches(value, known, n=1, cutoff=0.5)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return InputError(f"{value!r} is {what} {', '.join(known)}.{hint}")
