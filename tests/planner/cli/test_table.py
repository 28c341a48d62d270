"""Tables fit their width wherever words allow, and lose nothing; a pipe gets whole lines."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from planner.cli.main import main
from planner.cli.table import folded, table

words = st.text("abcdefgh", min_size=1, max_size=9)
texts = st.lists(words, min_size=1, max_size=12).map(" ".join)
tables = st.lists(st.tuples(texts, st.integers(0, 10**6).map(str), texts), min_size=1, max_size=6)
HEAD = ["loss", "stall ms", "the worst in"]


def head_words(lines: list[str]) -> list[str]:
    """The words of the heading and its rule, as they are in the table."""
    at = next(i for i, line in enumerate(lines) if line.startswith("---"))
    return " ".join(lines[: at + 1]).split()


@given(tables, st.integers(50, 100))
def test_a_table_fits_its_width_and_keeps_every_word(rows, width):
    lines = table(HEAD, rows, width=width).split("\n")
    assert max(map(len, lines)) <= width
    kept = " ".join(" ".join(row) for row in rows).split()
    assert sorted(" ".join(lines).split()) == sorted([*kept, *head_words(lines)])
    assert sorted(word for word in head_words(lines) if "-" not in word) == sorted(" ".join(HEAD).split())


@given(tables)
def test_without_a_width_a_row_is_a_line(rows):
    lines = table(HEAD, rows).split("\n")
    assert [" ".join(line.split()) for line in lines[2:]] == [" ".join(row) for row in rows]


@given(texts, st.integers(20, 60))
def test_a_folded_line_keeps_its_words_and_its_indent(text, width):
    shown = folded("  " + text, width).split("\n")
    assert " ".join(shown).split() == text.split()
    assert all(len(line) <= width and line.startswith("  ") for line in shown)
    assert folded(text, None) == text


def test_reports_fit_80_columns_and_a_pipe_gets_whole_rows(capsys, tmp_path, monkeypatch):
    plan = str(tmp_path / "plan.json")
    commands = (
        ["solve", "olmoe-1b-7b", "h100:2x8", "--arch", "disaggregated", "--out", plan],
        ["degrade", plan, "--pairs", "20"],
        ["certify", plan, "--slo", "stall_ms=9000", "--load", "0.1", "--without-front"],
        ["simulate", plan, "--days", "3"],
        ["explain", plan, "rank", "3"],
        ["solve", "qwen3-30b-a3b", "h100:3x4", "--arch", "auto"],
        ["solve", "qwen3-30b-a3b", "h100:3x4", "--arch", "pd", "--out", plan],
        ["degrade", plan],
    )
    for command in commands:
        monkeypatch.setenv("COLUMNS", "80")
        assert main(command) == 0
        narrow = capsys.readouterr().out
        assert max(map(len, narrow.split("\n"))) <= 80, command
        monkeypatch.delenv("COLUMNS")
        assert main(command) == 0
        wide = capsys.readouterr().out
        assert len(wide.split("\n")) <= len(narrow.split("\n"))
        assert "free -" not in " ".join(wide.split())
