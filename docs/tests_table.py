"""Writes the table "module -> tests that hold it": `python -m docs.tests_table > docs/tests.md`.

A module is held by the test file that mirrors it (tests/<package>/<room>/test_<module>.py) and by the test files that
import it; a module that none imports, by the tests of the modules that use it.
"""

import ast
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("serving", "moejax", "planner", "simulation")
SHOWN = 4
RUN_BY = {
    "moejax.runtime.aot": ("planner.cli.test_compile_ahead",),
    "moejax.runtime.coordinator": ("e2e.test_front", "e2e.test_recovery"),
    "moejax.runtime.distributed": ("e2e.test_prepare_ahead", "e2e.test_recovery"),
    "moejax.runtime.role_programs": ("e2e.test_disaggregated",),
    "planner.cli.plots": ("planner.cli.test_main",),
    "serving.cli.front": ("e2e.test_front",),
    "serving.cli.supervisor": ("e2e.test_front", "e2e.test_processes", "serving.cli.test_main"),
    "serving.launch.ray": ("e2e.test_ray",),
    "serving.worker.main": ("e2e.test_recovery", "serving.worker.test_front_link"),
}
"""Modules that no test imports, since they are the program of a process, or do what only real processes do; and the
tests that run them."""
HEAD = """\
# Tests by module

Written by `python -m docs.tests_table > docs/tests.md`. A module is held by the test file that mirrors it (**bold**)
and by the files that import it. A module that no test file imports is held through the modules that use it: their tests
follow *through*. *In processes* stands before the tests that hold a module by running it as a process of its own, or in
such ones: what it does, such as joining JAX's coordination service, cannot be held without. Real servers (`tests/e2e`)
hold all of it together.
"""


def python_files(folder: str) -> dict[str, Path]:
    """Modules and packages of a folder by dotted name, without generated stubs."""
    found = sorted((ROOT / folder).rglob("*.py"))
    names = (f.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".").removesuffix(".__init__") for f in found)
    return {name: file for name, file in zip(names, found, strict=True) if "_pb2" not in name}


def imported(file: Path) -> set[str]:
    """Every dotted name that a file imports, modules and their attributes alike."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def table() -> dict[str, tuple[str, list[str], bool]]:
    """For each module: the test file that mirrors it or "", other test files, and whether these use it directly."""
    modules = {name: file for package in PACKAGES for name, file in python_files(package).items()}
    users, tests = defaultdict(set), defaultdict(set)
    for name, file in modules.items():
        for other in imported(file) & modules.keys():
            users[other].add(name)
    test_files = {name: file for name, file in python_files("tests").items() if file.name.startswith("test_")}
    for name, file in test_files.items():
        for module in imported(file) & modules.keys():
            tests[module].add(name)
    found = {}
    for module, file in modules.items():
        if file.name in ("__init__.py", "__main__.py"):
            continue
        mirror = "tests." + ".".join((*module.split(".")[:-1], f"test_{file.stem}"))
        reached, seen = {module}, {module}
        while reached and not any(tests[each] for each in reached):
            reached = {user for each in reached for user in users[each]} - seen
            seen |= reached
        others = sorted({test for each in reached for test in tests[each]} - {mirror})
        mirrored = mirror in test_files
        found[module] = (mirror if mirrored else "", others, mirrored or bool(tests[module]))
    return found


def page() -> str:
    """The page, as Markdown."""
    parts, room_before = [HEAD], ""
    for module, (mirror, others, direct) in table().items():
        room, _, name = module.rpartition(".")
        if room != room_before:
            parts.append(f"\n## {room}\n\n| module | held by |\n|---|---|\n")
            room_before = room
        how = "" if direct else "*through* "
        if not mirror and module in RUN_BY:
            how, others = "*in processes* ", [f"tests.{name}" for name in RUN_BY[module]]
        shown = [each.removeprefix("tests.") for each in others[:SHOWN]]
        more = [f"{len(others) - SHOWN} more"] if len(others) > SHOWN else []
        held = ([f"**{mirror.removeprefix('tests.')}**"] if mirror else []) + [*shown, *more]
        parts.append(f"| {name} | {how}{', '.join(held) or '`tests/e2e`'} |\n")
    return "".join(parts)


if __name__ == "__main__":
    print(page(), end="")
