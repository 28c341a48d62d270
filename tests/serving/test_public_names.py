"""`import serving` offers the clients, the server, and every type that a caller needs."""

import dataclasses
import typing

import pytest

import serving
from serving.errors import MoejaxError

BUILTIN = {"str", "int", "float", "bool", "NoneType"}


def named_types(hint) -> set[str]:
    """Names of the classes in a type hint."""
    parts = typing.get_args(hint)
    if parts:
        return set().union(*(named_types(part) for part in parts if part is not Ellipsis))
    return {hint.__name__} if isinstance(hint, type) else set()


def test_every_name_of_all_exists():
    assert all(hasattr(serving, name) for name in serving.__all__)
    assert sorted(serving.__all__) == serving.__all__


def test_every_error_of_the_server_can_be_caught_by_name():
    classes, queue = set(), [MoejaxError]
    while queue:
        kind = queue.pop()
        classes.add(kind.__name__)
        queue += kind.__subclasses__()
    assert {name for name in classes if name in vars(serving.errors)} | {"Unreachable"} <= set(serving.__all__)


@pytest.mark.parametrize("method", [n for n in vars(serving.Client) if not n.startswith("_")])
def test_every_type_that_a_client_returns_can_be_imported_from_serving(method):
    returned = named_types(typing.get_type_hints(getattr(serving.Client, method))["return"])
    assert returned - BUILTIN <= set(serving.__all__)


@pytest.mark.parametrize(
    "kind", [serving.Status, serving.RankStatus, serving.CompletionOutput, serving.Chunk, serving.SamplingParams]
)
def test_types_inside_what_a_client_returns_can_be_imported_too(kind):
    hints = typing.get_type_hints(kind)
    named = set().union(*(named_types(hints[field.name]) for field in dataclasses.fields(kind)))
    assert named - BUILTIN <= set(serving.__all__)
