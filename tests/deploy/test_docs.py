"""The documentation builds, and what it says of settings, metrics and commands is so."""

import re
from pathlib import Path

import click
import pytest
from prometheus_client.parser import text_string_to_metric_families

from docs.settings_table import page
from serving import cli
from serving.metrics import Metrics

ROOT = Path(__file__).resolve().parents[2]
PAGES = [*sorted((ROOT / "docs").glob("*.md")), ROOT / "README.md"]


def test_the_page_of_settings_is_what_the_generator_writes():
    assert (ROOT / "docs" / "settings.md").read_text() == page()


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
        command = cli.main.commands.get(words[0]) if words else None
        if command is None or any(p.name == "arguments" for p in command.params):  # which other programs read
            continue
        if isinstance(command, click.Group) and len(words) > 1:
            command = command.commands[words[1]]
        known = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
        used = {word.partition("=")[0] for word in words if re.fullmatch(r"--[a-z][a-z-]+(=.*)?", word)}
        assert used <= known | {"--help"}, line


def test_every_metric_in_the_text_is_exported(backend):
    exported = {
        name
        for family in text_string_to_metric_families(Metrics(backend).render().decode())
        for name in (family.name, f"{family.name}_total", *(sample.name for sample in family.samples))
    }
    told = set(re.findall(r"\b(?:vllm:|moejax_)[a-z0-9_]+", (ROOT / "docs" / "observability.md").read_text()))
    assert len(told) > 25
    assert told <= exported
