"""The command line: `moejax COMMAND`. Every command's --help shows an example."""

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import click
import rich.console

import planner.cli
from serving.app import serve as serve_until_stopped
from serving.client import DEFAULT_ADDRESS, Client
from serving.config import Settings
from serving.errors import DeadlineExceeded, MoejaxError
from serving.tables import event_line, printable, status_view
from serving.tokens import Message
from serving.version import version

MODELS = {
    "smollm2-moe": "SmolLM2-135M-Instruct with every third layer split into experts; fetched on first use",
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


def example(*lines: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Show lines as the end of a command's --help."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        shown = "\n".join(f"  {line}" for line in lines)
        function.__doc__ = f"{function.__doc__}\n\n\b\nExample:\n{shown}\n"
        return function

    return decorate


_server = click.option(
    "--server",
    default=DEFAULT_ADDRESS,
    show_default=True,
    envvar="MOEJAX_SERVER",
    metavar="HOST:PORT",
    help="gRPC address of a running server.",
)


def _sampling(function: Callable[..., Any]) -> Callable[..., Any]:
    """The options of SamplingParams; what is not given is the server's default."""
    for option in (
        click.option("--max-tokens", type=int, help="Length of the answer.  [default: what fits]"),
        click.option("--temperature", type=float, help="0 is greedy.  [default: 1]"),
        click.option("--top-k", type=int, help="Only the k most likely tokens."),
        click.option("--top-p", type=float, help="Only tokens that together reach this probability."),
        click.option("--min-p", type=float, help="Only tokens this likely relative to the likeliest."),
        click.option("--seed", type=int, help="The same seed gives the same text."),
        click.option("--stop", multiple=True, metavar="TEXT", help="End before this text; may be repeated."),
    ):
        function = option(function)
    return function


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
@click.option("--config", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="Settings as TOML.")
@click.option("--model", help="A known model (`moejax models`) or a model folder.  [default: smollm2-moe]")
@click.option("--ranks", type=int, help="Rank processes, one per device.  [default: 4]")
@click.option("--host", help="Address to listen on.  [default: 127.0.0.1]")
@click.option("--grpc-port", type=int, help="0 takes a free one.  [default: 50051]")
@click.option("--http-port", type=int, help="0 takes a free one.  [default: 8000]")
@click.option("--chaos", is_flag=True, default=None, help="Let clients kill ranks.")
@click.option("--no-restart", is_flag=True, help="Do not replace ranks that died.")
@click.option("--slots-per-rank", type=int, help="Expert slots per layer.  [default: the planner's choice]")
@click.option("--survive", type=int, help="Losses that need no new weight buffers.  [default: 1]")
@click.option("--max-queue", type=int, help="Requests that may wait.  [default: 1024]")
@example("moejax serve --model tiny --ranks 4 --chaos", "MOEJAX_HTTP_PORT=9000 moejax serve --config my.toml")
def serve(config: Path | None, no_restart: bool, **flags: Any) -> None:
    """Serve a model over gRPC and HTTP until Ctrl-C.

    Each setting comes from its flag, else from the environment (MOEJAX_RANKS and so on), else from --config.
    """
    settings = Settings.load(config, restart=False if no_restart else None, **flags)
    raise SystemExit(serve_until_stopped(settings))


@main.command()
@click.argument("prompt")
@_server
@_sampling
@click.option("--json", "as_json", is_flag=True, help="Print the whole result as JSON when it is there.")
@example(
    'moejax generate "The capital of France is" --temperature 0 --max-tokens 8',
    "moejax generate - < prompt.txt",
)
def generate(prompt: str, server: str, as_json: bool, **options: Any) -> None:
    """Continue PROMPT, streaming the text. "-" reads the prompt from standard input. Ctrl-C cancels."""
    text = sys.stdin.read() if prompt == "-" else prompt
    with Client(server) as client:
        if as_json:
            click.echo(json.dumps(dataclasses.asdict(client.generate(text, **_given(options)))))
            return
        try:
            _print_stream(client, text, options)
        except KeyboardInterrupt:
            click.echo(err=True)
            raise SystemExit(_INTERRUPTED) from None


@main.command()
@_server
@click.option("--system", help="Instructions before the conversation.")
@_sampling
@example('moejax chat --system "Answer in one sentence." --temperature 0.7')
def chat(server: str, system: str | None, **options: Any) -> None:
    """Talk with the model. Ctrl-C ends an answer, Ctrl-D the conversation; /reset begins anew."""
    first = [Message("system", system)] if system else []
    history = list(first)
    with Client(server) as client:
        click.echo(f"{client.model().name} at {server}. Ctrl-D ends, /reset begins anew.", err=True)
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
@_server
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
@example("moejax status", "moejax status --json | jq .ranks[0].pid")
def status(server: str, as_json: bool) -> None:
    """Show ranks, mesh, slots, prepared losses and requests."""
    with Client(server) as client:
        now, model = client.status(), client.model()
    if as_json:
        click.echo(json.dumps(dataclasses.asdict(now) | {"model": dataclasses.asdict(model)}))
    else:
        rich.console.Console().print(status_view(now, model))


@main.command()
@_server
@click.option("--follow", "-f", is_flag=True, help="Go on as things happen, until Ctrl-C.")
@click.option("--after", type=int, default=0, help="Only events with a sequence above this.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object per line.")
@example("moejax events --follow")
def events(server: str, follow: bool, after: int, as_json: bool) -> None:
    """Show what happened to the server: losses, recoveries by phase, ranks that came back."""
    console = rich.console.Console(soft_wrap=True)
    with Client(server) as client:
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


@main.command()
@click.argument("rank", type=click.IntRange(min=0))
@click.option("--signal", type=click.Choice(["SIGKILL", "SIGSTOP"]), default="SIGKILL", show_default=True)
@_server
@example("moejax kill 2", "moejax kill 0 --signal SIGSTOP")
def kill(rank: int, signal: str, server: str) -> None:
    """Kill RANK of a server started with --chaos, or stop it so that it hangs."""
    with Client(server) as client:
        client.kill(rank, signal)
    click.echo(f"sent {signal} to rank {rank}; see `moejax events`.")


@main.command()
@example("moejax models", "moejax serve --model tiny")
def models() -> None:
    """List the models that --model knows by name."""
    for name, text in MODELS.items():
        click.echo(f"{name:<14} {text}")


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
