"""The documentation builds, and what it says of settings, metrics and commands is so."""

import re
import subprocess
from pathlib import Path

import click
import pytest
from prometheus_client.parser import text_string_to_metric_families

from clients import record
from clients.tool import tools
from docs import (
    anthropic_table,
    membership_table,
    models_table,
    openai_table,
    responses_table,
    settings_table,
    tests_table,
)
from serving.cli import main
from serving.observability.metrics import Metrics

ROOT = Path(__file__).parents[2]
WRITTEN_BY_USERS = {"cluster.toml", "moejax.toml"}
PAGES = [*sorted((ROOT / "docs").glob("*.md")), ROOT / "README.md"]


def test_the_page_of_settings_is_what_the_generator_writes():
    assert (ROOT / "docs" / "settings.md").read_text() == settings_table.page()


def test_the_page_of_models_is_what_the_generator_writes():
    assert (ROOT / "docs" / "models.md").read_text() == models_table.page()


def test_the_page_of_the_openai_api_is_what_the_generator_writes():
    assert (ROOT / "docs" / "openai.md").read_text() == openai_table.page()


def test_the_page_of_anthropics_api_is_what_the_generator_writes():
    assert (ROOT / "docs" / "anthropic.md").read_text() == anthropic_table.page()


def test_the_page_of_the_responses_api_is_what_the_generator_writes():
    assert (ROOT / "docs" / "responses.md").read_text() == responses_table.page()


def test_the_page_of_clients_is_made_of_the_record_of_their_trials():
    rows = record.load()
    assert (ROOT / "docs" / "clients.md").read_text() == record.page(list(rows.values()))
    assert rows.keys() <= {tool.key for tool in tools()}


def test_the_page_of_tests_is_what_the_generator_writes():
    assert (ROOT / "docs" / "tests.md").read_text() == tests_table.page()


def test_every_decision_has_a_number_of_its_own_and_a_place_in_the_documentation() -> None:
    records = sorted(file.name for file in (ROOT / "docs" / "decisions").glob("*.md"))
    listed = [
        line.split("decisions/")[1] for line in (ROOT / "mkdocs.yml").read_text().splitlines() if "decisions/" in line
    ]
    assert listed == records
    assert len({name[:4] for name in records}) == len(records)
    for name in records:
        assert (ROOT / "docs" / "decisions" / name).read_text().startswith(f"# {int(name[:4])}. "), name


def test_the_table_of_what_becomes_of_a_rank_is_that_of_the_transitions() -> None:
    assert (ROOT / "docs" / "membership.md").read_text() == membership_table.page()


def test_the_site_builds_without_a_broken_link(tmp_path):
    config = pytest.importorskip("mkdocs.config", reason="needs moejax[docs]")
    build = pytest.importorskip("mkdocs.commands.build")
    loaded = config.load_config(str(ROOT / "mkdocs.yml"), site_dir=str(tmp_path))
    build.build(loaded)  # strict: a warning is an error
    assert (tmp_path / "tutorial" / "index.html").is_file()


@pytest.mark.parametrize("path", PAGES, ids=lambda p: p.name)
def test_every_flag_and_command_in_the_text_is_there(path):
    for line in re.findall(r"(?:moejax|scripts/serve)\b[^\n`|#&]*", path.read_text()):
        words = (["serve"] if line.startswith("scripts/serve") else []) + re.findall(r"\S+", line)[1:]
        command = main.main.commands.get(words[0]) if words else None
        if command is None or any(p.name == "arguments" for p in command.params):  # which other programs read
            continue
        if isinstance(command, click.Group) and len(words) > 1:
            command = command.commands[words[1]]
        known = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
        used = {word.partition("=")[0] for word in words if re.fullmatch(r"--[a-z][a-z-]+(=.*)?", word)}
        assert used <= known | {"--help"}, line


@pytest.mark.parametrize("path", PAGES, ids=lambda p: p.name)
def test_every_command_between_backquotes_is_there(path):
    named = re.findall(r"`moejax ([a-z][a-z-]*)", path.read_text())
    assert not [name for name in named if name not in main.main.commands]


def test_every_file_that_a_document_names_is_there():
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    ends = {file[at:] for file in files for at in (0, *(i + 1 for i, c in enumerate(file) if c == "/"))}
    decisions = sorted((ROOT / "docs" / "decisions").glob("*.md"))
    missing = [
        f"{page.name}: {name}"
        for page in (*PAGES, ROOT / "CONTRIBUTING.md", *decisions)
        for name in re.findall(r"`((?:[\w-]+/)*\w+\.(?:py|cc|h|proto|toml|yaml))`", page.read_text())
        if name not in ends and name not in WRITTEN_BY_USERS
    ]
    assert not missing, missing


def test_every_metric_in_the_text_is_exported(backend):
    exported = {
        name
        for family in text_string_to_metric_families(Metrics(backend).render(backend.status()).decode())
        for name in (family.name, f"{family.name}_total", *(sample.name for sample in family.samples))
    }
    told = set(re.findall(r"\b(?:vllm:|moejax_)[a-z0-9_]+", (ROOT / "docs" / "observability.md").read_text()))
    assert len(told) > 25
    assert told <= exported
