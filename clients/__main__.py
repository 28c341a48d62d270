"""Install each tool, run it against a real server, and write docs/clients.md: `scripts/clients [--only NAME,...]`."""

import datetime
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import click

from clients.environment import NotInstalled, environment, interpreter
from clients.record import PAGE, ROOT, Outcome, Row, load, save
from clients.tool import Tool, tools
from serving import Client, Server

TINY = ROOT / "models" / "tiny"
NAMES = ", ".join(tool.key for tool in tools())


@click.command()
@click.option(
    "--only", help=f"Names of tools, separated by commas; the rows of the others are kept. There are {NAMES}."
)
@click.option("--model", default=str(TINY), show_default=False, help="Model to serve. Default: models/tiny.")
@click.option("--ranks", default=2, show_default=True, help="Number of ranks.")
@click.option(
    "--log", type=click.Path(path_type=Path), help="Folder for the output of the tools. Default: none is kept."
)
def main(only: str | None, model: str, ranks: int, log: Path | None) -> None:
    """Run the trials. The exit code is 1 when one fails by the server's fault."""
    chosen = [tool for tool in tools() if only is None or tool.key in only.split(",")]
    unknown = set(only.split(",") if only else ()) - {tool.key for tool in chosen}
    if unknown:
        raise click.UsageError(f"no tool is named {', '.join(sorted(unknown))}; there are {NAMES}")
    with (
        tempfile.TemporaryDirectory() as journal,
        Server(model=model, ranks=ranks, vllm_grpc=True, journal=journal) as server,
    ):
        at = where(server, Path(model))
        rows: dict[str, Row] = {}
        for tool in chosen:  # each is kept at once: all of them take half an hour, and not every run ends
            rows[tool.key] = try_tool(tool, at, log)
            save(load() | rows, [tool.key for tool in tools()])
    click.echo(f"{PAGE.relative_to(ROOT)} is written")
    raise SystemExit(0 if all(row.works for row in rows.values()) else 1)


def where(server: Server, folder: Path) -> dict[str, str]:
    """Environment variables that the programs of the tools read: a server and its model (`clients/trials.py`)."""
    with Client(server) as client:
        name = client.model().name
    return {
        "CLIENTS_URL": server.url,
        "CLIENTS_GRPC": server.address,
        "CLIENTS_MODEL": name,
        "CLIENTS_FOLDER": str(folder),
    }


def try_tool(tool: Tool, at: dict[str, str], log: Path | None) -> Row:
    """Install a tool and run its trials."""
    row = Row(
        name=tool.name,
        version=tool.version,
        registry=tool.registry,
        date=datetime.date.today().isoformat(),
        model=at["CLIENTS_MODEL"],
    )
    try:
        folder = environment(tool)
    except NotInstalled as error:
        click.echo(f"{tool.key}: not installed: {error}")
        return Row(**vars(row) | {"not_installed": str(error)})
    outcomes = run_trials(tool, interpreter(tool, folder), at | {"CLIENTS_ENVIRONMENT": str(folder)}, log)
    for outcome in outcomes:
        click.echo(f"{tool.key}: {outcome.trial}: {outcome.result}{f' ({outcome.remark})' if outcome.remark else ''}")
    return Row(**vars(row) | {"outcomes": tuple(outcomes)})


def run_trials(tool: Tool, command: list[str], at: dict[str, str], log: Path | None = None) -> list[Outcome]:
    """Run the program of a tool, and return what came out. A program that ends early is a failed trial."""
    offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "DO_NOT_TRACK": "1"}
    keys = {"OPENAI_API_KEY": "none", "ANTHROPIC_API_KEY": "none"}
    quiet = os.environ | offline | keys | at
    quiet["PYTHONPATH"] = str(ROOT)
    try:
        with tempfile.TemporaryDirectory() as folder:  # some tools leave files where they run
            done = subprocess.run(
                command, cwd=folder, env=quiet, capture_output=True, text=True, timeout=tool.minutes * 60
            )
        text, errors, code = done.stdout, done.stderr, done.returncode
    except subprocess.TimeoutExpired as late:
        text, errors, code = _text(late.stdout), _text(late.stderr), None
    if log is not None:
        log.mkdir(parents=True, exist_ok=True)
        (log / f"{tool.key}.log").write_text(text + errors)
    outcomes = [Outcome(**json.loads(line)) for line in text.splitlines() if line.startswith('{"trial"')]
    if code != 0:
        reason = f"no end within {tool.minutes:g} minutes" if code is None else errors.strip().rpartition("\n")[2]
        outcomes.append(Outcome(trial="the program of the trials", result="fails", remark=reason))
    return outcomes


def _text(output: bytes | str | None) -> str:
    return output.decode(errors="replace") if isinstance(output, bytes) else output or ""


if __name__ == "__main__":
    sys.exit(main())
