"""`import serving` offers the clients, the server, and every type that a caller needs."""

import ast
import dataclasses
import inspect
import subprocess
import sys
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


def test_names_that_are_imported_at_their_first_use_are_all_names_and_the_names_that_a_type_checker_sees():
    tree = ast.parse(inspect.getsource(serving))
    (for_checkers,) = (node for node in tree.body if isinstance(node, ast.If))
    seen = {alias.name for node in ast.walk(for_checkers) if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert seen == set(serving.__all__)
    with pytest.raises(AttributeError, match="no attribute 'Servre'"):
        serving.Servre  # noqa: B018


def test_packages_of_public_names_are_there_without_an_import_of_their_own():
    used = "import serving; print(serving.errors.QueueFull.__name__, serving.config.Settings.__name__)"
    assert subprocess.check_output([sys.executable, "-c", used], text=True).split() == ["QueueFull", "Settings"]


def modules_of(statements: str) -> set[str]:
    """The modules that an interpreter has imported after some statements."""
    command = [sys.executable, "-c", f"import sys; {statements}; print(*sys.modules, file=sys.stderr)"]
    return {*subprocess.run(command, check=True, capture_output=True, text=True).stderr.split()}


def test_the_process_of_a_rank_imports_no_client_and_no_surface():
    modules = modules_of("import serving.worker.main")
    assert "serving.worker.rank" in modules
    assert not {"serving.app", "serving.server", "serving.api", "serving.core", "starlette", "tokenizers"} & modules


def test_the_supervisor_imports_nothing_that_only_the_processes_which_it_starts_need():
    serve = "from serving.cli.main import main; main(['serve', '--show-settings'], standalone_mode=False)"
    modules = modules_of(serve)
    assert "serving.cli.supervisor" in modules
    unneeded = {"serving.app", "serving.api", "serving.core", "serving.observability.metrics", "numpy", "rich"}
    assert not unneeded & modules


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
