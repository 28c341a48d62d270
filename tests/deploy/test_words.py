"""One thing has one word: class names are unique, and documents and docstrings use the words of docs/glossary.md."""

import ast
import io
import re
import tokenize
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("serving", "moejax", "planner")
SOURCES = (*PACKAGES, "benchmarks", "clients", "docs", "deploy", "examples", "tests")
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
FORMER_WORDS = {
    r"always-on": "shared expert",
    r"anew": "again",
    r"cache cop(y|ies)": "KV replica",
    r"crew": "launcher",
    r"(un)?divided (dense )?(layers?|heads|attention)|(layers?|heads) (are |is |be )?divided": "sharded",
    r"fore(see|seen|sees|seeing|saw)": "predict, prepare for",
    r"forsaken": "whose front is lost",
    r"hears?|heard": "receive",
    r"is looked|are looked": "is checked",
    r"keepers?": "host agent",
    r"ledgers?": "request log",
    r"mates": "tp peers",
    r"newcomers?": "replacement, or the state of the rank",
    r"now and then": "the interval",
    r"outlooks?|prospects?": "loss forecast",
    r"protectors?": "KV replicator",
    r"readopt\w*": "reconcile",
    r"salvag\w+": "recoverable KV",
    r"seats?|seated": "process id, spare process id",
    r"shelf|shelves": "host expert buffer",
    r"tally|tallies": "step stats",
    r"tells?|told|telling": "report, send, log",
    r"thereof": "of it",
    r"those that": "the noun",
    r"turn about": "in turn, alternately",
}
"""Words for which the field, or the glossary, has another one, and that other one."""
EXCEPTIONS = {
    "configs/calibration.txt": "text of a language model",
}
"""Files that may use former words, and why."""


def texts(file: Path) -> Iterator[tuple[int, str]]:
    """The docstrings, descriptions of fields and comments of a Python file, each with its line."""
    source = file.read_text()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            yield node.lineno, node.value.value
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string


def prose(text: str) -> str:
    """The text without code: blocks between fences, and spans between backquotes."""
    return re.sub(r"```.*?```|`[^`\n]*`", " ", text, flags=re.DOTALL)


def former_words(text: str) -> list[str]:
    """The former words in a text, each with the word that replaces it."""
    words = re.sub(r"\s+", " ", prose(text))
    return [
        f"{found[0]!r}: {better}"
        for former, better in FORMER_WORDS.items()
        for found in re.finditer(rf"(?<![\w/-])(?:{former})(?![\w-])", words, re.IGNORECASE)
    ]


def python_files(folder: str) -> Iterator[Path]:
    """The Python files of a folder that are written by hand."""
    return (file for file in sorted((ROOT / folder).rglob("*.py")) if "_pb2" not in file.name)


def test_no_class_name_stands_twice():
    places = defaultdict(list)
    for package in PACKAGES:
        for file in python_files(package):
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.ClassDef):
                    places[node.name].append(f"{file.relative_to(ROOT)}:{node.lineno}")
    assert {name: found for name, found in places.items() if len(found) > 1} == {}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_documents_use_the_words_of_the_glossary(page):
    assert former_words(page.read_text()) == []


@pytest.mark.parametrize("folder", [*SOURCES, "simulation"])
def test_docstrings_and_comments_use_the_words_of_the_glossary(folder):
    found = [
        f"{file.relative_to(ROOT)}:{line}: {word}"
        for file in python_files(folder)
        for line, text in texts(file)
        for word in former_words(text)
    ]
    assert found == []


@pytest.mark.parametrize("folder", [*SOURCES, "simulation"])
def test_docstrings_begin_with_what_a_thing_is_or_does(folder):
    assert [
        f"{file.relative_to(ROOT)}:{line}: {text.split(chr(10))[0]}"
        for file in python_files(folder)
        for line, text in texts(file)
        if text.lstrip().startswith("What ")
    ] == []
