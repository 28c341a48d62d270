"""`import planner` offers what plans are made with, and each name is imported when it is first used."""

import ast
import inspect

import pytest

import planner


def test_every_name_is_there_and_known_to_a_type_checker():
    tree = ast.parse(inspect.getsource(planner))
    (for_checkers,) = (node for node in tree.body if isinstance(node, ast.If))
    seen = {alias.name for node in ast.walk(for_checkers) if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert seen | {"solve"} == set(planner.__all__)
    assert all(getattr(planner, name).__name__ == name for name in planner.__all__)
    with pytest.raises(AttributeError, match="no attribute 'slove'"):
        planner.slove  # noqa: B018
