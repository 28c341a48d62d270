"""The commands that run other programs: the planner, and tools that need JAX, each in a process of its own."""

import importlib
import importlib.util
import pkgutil
import subprocess
import sys
from collections.abc import Sequence

import click

from serving.cli.options import example
from serving.errors import InvalidRequest, StartError

KNOWN_MODELS = {
    "smollm2-moe": "SmolLM2-135M-Instruct split into experts; fetched on first use",
    "bench-mixtral": "Mixtral's shape with 140 M random weights, to measure speed",
    "tiny": "3.6 M parameters, 8 experts; part of moejax, for tests",
}
_PASSED_ON = {"ignore_unknown_options": True, "allow_interspersed_args": False}
"""Context settings of a command that passes its arguments on to another program."""


def _run(module: str, arguments: Sequence[str]) -> int:
    """Run a module as a program; its exit status."""
    return subprocess.call([sys.executable, "-m", module, *arguments])


@click.command(short_help="List the models known by name, and the model families.")
@example("moejax models", "moejax serve --model tiny")
def models() -> None:
    """List the models that --model knows by name, and the families that are served from a published folder."""
    for name, text in KNOWN_MODELS.items():
        click.echo(f"{name:<14} {text}")
    click.echo("\nFamilies, from a folder of config.json and safetensors (mistral_format: params.json):")
    command = [sys.executable, "-m", "moejax.tools.inspect", "--families"]
    ended = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    click.echo(ended.stdout, nl=False)
    raise SystemExit(ended.returncode)


@click.command(context_settings=_PASSED_ON, short_help="Plan meshes and expert placements; needs no device.")
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
@example("moejax plan solve deepseek-v3 h200:40x8", "moejax plan solve --help")
def plan(arguments: tuple[str, ...]) -> None:
    """Plan meshes and expert placements. Needs no server and no device.

    `moejax plan` without arguments lists the commands of the planner.
    """
    import planner.cli.main  # here, as no other command needs it

    raise SystemExit(planner.cli.main.main(list(arguments)))


@click.command(context_settings=_PASSED_ON, short_help="Train a small model.")
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
@example("moejax train tiny --out my-model", "moejax train -- --help")
def train(arguments: tuple[str, ...]) -> None:
    """Train a small model. `moejax train -- --help` lists the arguments."""
    raise SystemExit(_run("moejax.tools.train", arguments))


@click.command(context_settings=_PASSED_ON, short_help="Show the size of a model and a first plan for it.")
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
@example("moejax inspect ./Mixtral-8x7B-Instruct-v0.1 --ranks 8", "moejax inspect tiny --json")
def inspect(arguments: tuple[str, ...]) -> None:
    """Show a model's configuration, parameters, bytes, KV cache per token, and a first plan for it.

    `moejax inspect -- --help` lists the arguments.
    """
    raise SystemExit(_run("moejax.tools.inspect", arguments))


@click.command(context_settings=_PASSED_ON, short_help="Convert a published model folder to a checkpoint.")
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
@example("moejax convert ./Mixtral-8x7B-Instruct-v0.1 ./mixtral", "moejax convert -- --help")
def convert(arguments: tuple[str, ...]) -> None:
    """Convert a published model folder (safetensors) to a checkpoint. A conversion that was interrupted continues.

    `moejax convert -- --help` lists the arguments.
    """
    raise SystemExit(_run("moejax.checkpoint.convert", arguments))


@click.command(context_settings=_PASSED_ON, short_help="Run a benchmark of the source tree.")
@click.argument("benchmark")
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
@example("moejax bench recovery --help", "moejax bench load --model tiny --json load.json")
def bench(benchmark: str, arguments: tuple[str, ...]) -> None:
    """Run BENCHMARK (recovery, throughput, load or another of benchmarks/ in the source tree) with its ARGUMENTS."""
    if importlib.util.find_spec("benchmarks") is None:
        raise StartError("the benchmarks come with the source tree: clone it and run scripts/moejax bench there.")
    known = sorted(m.name for m in pkgutil.iter_modules(importlib.import_module("benchmarks").__path__))
    if benchmark not in known:
        raise InvalidRequest(f"there is no benchmark {benchmark!r}; there are {', '.join(known)}.", param="benchmark")
    raise SystemExit(_run(f"benchmarks.{benchmark}", arguments))
