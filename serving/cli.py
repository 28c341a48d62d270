"""The command line: `moejax COMMAND`. Every command's --help shows an example."""

import dataclasses
import importlib
import importlib.util
import json
import pkgutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from typing import Any

import click
import rich.console

import planner.cli
from serving.app import serve as serve_until_stopped
from serving.client import Client
from serving.config import Settings
from serving.errors import DeadlineExceeded, InvalidRequest, MoejaxError, NoCapacity, StartError
from serving.faults import ACTIONS, Action
from serving.joining import rank, tokens
from serving.operate import completion, doctor, keys
from serving.options import connected, example, sampling_options, settings_options
from serving.status import SIGNALS, SIGNALS_TO_WEIGHTS
from serving.supervisor import supervise
from serving.tables import event_line, printable, prospects_view, status_view
from serving.tokens import Message
from serving.version import version

MODELS = {
    "smollm2-moe": "SmolLM2-135M-Instruct with every third layer split into experts; fetched on first use",
    "bench-mixtral": "140 M parameters, Mixtral's shape with random weights, for measuring speed; made on first use",
    "tiny": "3.6 M parameters, 8 experts, trained here; comes with moejax, for tests and offline use",
}
_PAST_EVENTS_S = 0.5  # the stream of events has no end: past ones come at once, later ones after a pause
_INTERRUPTED = 130


class _Group(click.Group):
    """Errors are one line and exit status 1."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except MoejaxError as error:
            click.echo(f"moejax: {printable(str(error))}", err=True)
            ctx.exit(1)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(version(), prog_name="moejax")
def main() -> None:
    """Serve Mixture-of-Experts language models on JAX, and keep serving when devices die.

    \b
    Example:
      moejax serve --model tiny        in one terminal, and in another:
      moejax generate "ROMEO:"
    """


@main.command()
@settings_options
@click.option("--show-settings", is_flag=True, help="Print all settings as TOML and stop.")
@example("moejax serve --model tiny --ranks 4 --chaos", "MOEJAX_HTTP_PORT=9000 moejax serve --config my.toml")
def serve(settings: Settings, show_settings: bool) -> None:
    """Serve a model over gRPC and HTTP until Ctrl-C.

    Each setting comes from its flag, else from the environment (MOEJAX_RANKS and so on), else from --config.
    """
    if show_settings:
        click.echo(settings.to_toml(), nl=False)
        return
    raise SystemExit(supervise(settings) if settings.supervise else serve_until_stopped(settings))


@main.command()
@click.argument("prompt")
@connected
@sampling_options
@click.option("--json", "as_json", is_flag=True, help="Print the whole result as JSON when it is there.")
@example(
    'moejax generate "The capital of France is" --temperature 0 --max-tokens 8',
    "moejax generate - < prompt.txt",
)
def generate(client: Client, prompt: str, as_json: bool, **options: Any) -> None:
    """Continue PROMPT, streaming the text. "-" reads the prompt from standard input. Ctrl-C cancels."""
    text = sys.stdin.read() if prompt == "-" else prompt
    if as_json:
        click.echo(json.dumps(dataclasses.asdict(client.generate(text, **_given(options)))))
        return
    try:
        _print_stream(client, text, options)
    except KeyboardInterrupt:
        click.echo(err=True)
        raise SystemExit(_INTERRUPTED) from None


@main.command()
@connected
@click.option("--system", help="Instructions before the conversation.")
@sampling_options
@example('moejax chat --system "Answer in one sentence." --temperature 0.7')
def chat(client: Client, system: str | None, **options: Any) -> None:
    """Talk with the model. Ctrl-C ends an answer, Ctrl-D the conversation; /reset begins anew."""
    first = [Message("system", system)] if system else []
    history = list(first)
    click.echo(f"{client.model().name} at {client.address}. Ctrl-D ends, /reset begins anew.", err=True)
    for text in _turns():
        if text == "/reset":
            history = list(first)
            continue
        history.append(Message("user", text))
        try:
            history.append(Message("assistant", _print_stream(client, history, options)))
        except KeyboardInterrupt:
            click.echo(" [stopped]", err=True)
            history.pop()


@main.command()
@connected
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
@click.option("--plan", "as_plan", is_flag=True, help="Print the plan in force, as a file that `moejax plan` reads.")
@example("moejax status", "moejax status --json | jq .ranks[0].pid", "moejax status --plan > plan.json")
def status(client: Client, as_json: bool, as_plan: bool) -> None:
    """Show ranks, mesh, slots, prepared losses and requests."""
    if as_plan:
        plan = client.plan()
        if not plan:
            raise NoCapacity("no rank is alive, so there is no plan in force.")
        click.echo(plan)
        return
    now, model = client.status(), client.model()
    if as_json:
        click.echo(json.dumps(dataclasses.asdict(now) | {"model": dataclasses.asdict(model)}))
    else:
        rich.console.Console().print(status_view(now, model))


@main.command()
@connected
@click.option("--follow", "-f", is_flag=True, help="Go on as things happen, until Ctrl-C.")
@click.option("--after", type=int, default=0, help="Only events with a sequence above this.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object per line.")
@example("moejax events --follow")
def events(client: Client, follow: bool, after: int, as_json: bool) -> None:
    """Show what happened to the server: losses, recoveries by phase, ranks that came back."""
    console = rich.console.Console(soft_wrap=True)
    try:
        for event in client.watch(after, timeout_s=None if follow else _PAST_EVENTS_S):
            if as_json:
                click.echo(json.dumps(dataclasses.asdict(event)))
            else:
                console.print(event_line(event))
    except DeadlineExceeded:
        return
    except KeyboardInterrupt:
        raise SystemExit(_INTERRUPTED) from None


@main.command("what-if")
@connected
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
@example("moejax what-if")
def what_if(client: Client, as_json: bool) -> None:
    """Show what the loss of each rank, and of each host, would cost now."""
    prospects = client.what_if()
    if as_json:
        click.echo(json.dumps([dataclasses.asdict(prospect) for prospect in prospects]))
    else:
        rich.console.Console().print(prospects_view(prospects))


@main.command()
@click.argument("action", type=click.Choice(ACTIONS))
@click.argument("ranks", nargs=-1, type=click.IntRange(min=0))
@click.option("--host", default="", help="All ranks of this host.")
@click.option("--to", type=int, help="Scale until so many ranks serve.")
@click.option("--replace", is_flag=True, help="Of drain: start a new process in the rank's place.")
@connected
@example("moejax apply drain 2 --replace", "moejax apply scale_down --to 2", "moejax apply pause")
def apply(client: Client, action: Action, ranks: tuple[int, ...], host: str, to: int | None, replace: bool) -> None:
    """Change a server started with --operate or --chaos as planned: requests move, no token is lost."""
    serving = client.apply(action, *ranks, host=host, to=to, replace=replace)
    click.echo(f"ranks that serve: {' '.join(map(str, serving))}")


@main.command()
@click.argument("rank", type=click.IntRange(min=0), required=False)
@click.option("--host", default="", help="All ranks of this host instead.")
@click.option("--signal", type=click.Choice(SIGNALS + SIGNALS_TO_WEIGHTS), default="SIGKILL", show_default=True)
@connected
@example("moejax kill 2", "moejax kill 0 --signal SIGSTOP", "moejax kill --host host1", "moejax kill 1 --signal NAN")
def kill(client: Client, rank: int | None, host: str, signal: str) -> None:
    """Kill RANK of a server started with --chaos, stop it so that it hangs, or spoil the weights of an expert."""
    if (rank is None) == (not host):
        raise click.UsageError("give a RANK or a --host.")
    client.kill(rank or 0, signal, host=host)
    click.echo(f"sent {signal} to {host or f'rank {rank}'}; see `moejax events`.")


@main.command()
@example("moejax models", "moejax serve --model tiny")
def models() -> None:
    """List the models that --model knows by name, and the families it serves from published folders."""
    for name, text in MODELS.items():
        click.echo(f"{name:<14} {text}")
    click.echo("\nFamilies, from a folder of config.json and safetensors:")
    raise SystemExit(subprocess.call([sys.executable, "-m", "moejax.inspect", "--families"]))


_passed_on = {"ignore_unknown_options": True, "allow_interspersed_args": False}


@main.command(context_settings=_passed_on)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
@example("moejax plan solve deepseek-v3 h200:40x8", "moejax plan solve --help")
def plan(arguments: tuple[str, ...]) -> None:
    """Plan meshes and expert placements; needs no server and no device."""
    raise SystemExit(planner.cli.main(list(arguments)))


@main.command(context_settings=_passed_on)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
@example("moejax train --help")
def train(arguments: tuple[str, ...]) -> None:
    """Train a small model; arguments go to `python -m moejax.train`, a process of its own as it needs JAX."""
    raise SystemExit(subprocess.call([sys.executable, "-m", "moejax.train", *arguments]))


@main.command(context_settings=_passed_on)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
@example("moejax inspect ./Mixtral-8x7B-Instruct-v0.1 --ranks 8", "moejax inspect tiny --json")
def inspect(arguments: tuple[str, ...]) -> None:
    """Show what a model is and needs: configuration, parameters, bytes, cache per token, a first plan.

    Arguments go to `python -m moejax.inspect`, a process of its own as it needs JAX.
    """
    raise SystemExit(subprocess.call([sys.executable, "-m", "moejax.inspect", *arguments]))


@main.command(context_settings=_passed_on)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
@example("moejax convert ./Mixtral-8x7B-Instruct-v0.1 ./mixtral", "moejax convert --help")
def convert(arguments: tuple[str, ...]) -> None:
    """Convert a published model folder (safetensors) to ours; a conversion that was stopped goes on.

    Arguments go to `python -m moejax.convert`, a process of its own as it needs JAX.
    """
    raise SystemExit(subprocess.call([sys.executable, "-m", "moejax.convert", *arguments]))


@main.command(context_settings=_passed_on)
@click.argument("benchmark")
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
@example("moejax bench recovery --help", "moejax bench load --model tiny --json load.json")
def bench(benchmark: str, arguments: tuple[str, ...]) -> None:
    """Measure: BENCHMARK is recovery, throughput, load or another of the source tree's benchmarks/."""
    if importlib.util.find_spec("benchmarks") is None:
        raise StartError("the benchmarks come with the source tree: clone it and run scripts/moejax bench there.")
    known = sorted(m.name for m in pkgutil.iter_modules(importlib.import_module("benchmarks").__path__))
    if benchmark not in known:
        raise InvalidRequest(f"there is no benchmark {benchmark!r}; there are {', '.join(known)}.", param="benchmark")
    raise SystemExit(subprocess.call([sys.executable, "-m", f"benchmarks.{benchmark}", *arguments]))


for command in (keys, doctor, completion, rank, tokens):
    main.add_command(command)


def _given(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value not in (None, ())}


def _turns() -> Iterator[str]:
    """What the user types, until the end of the input."""
    while True:
        try:
            text = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return
        except KeyboardInterrupt:
            click.echo(err=True)
            continue
        if text:
            yield text


def _print_stream(client: Client, prompt: Any, options: dict[str, Any]) -> str:
    """Print an answer as it comes; returns it."""
    stream, parts = client.stream(prompt, **_given(options)), []
    try:
        for part in _texts(stream):
            parts.append(part)
            click.echo(printable(part), nl=False)
            sys.stdout.flush()
    finally:
        stream.cancel()
    click.echo()
    if stream.complete is not None and sys.stderr.isatty():
        done = stream.complete
        epochs = f", epochs {', '.join(map(str, done.epochs))}" if len(done.epochs) > 1 else ""
        click.secho(f"[{done.completion_tokens} tokens, {done.reason}{epochs}]", dim=True, err=True)
    return "".join(parts)


def _texts(chunks: Iterable[Any]) -> Iterator[str]:
    return (chunk.text for chunk in chunks if chunk.text)
