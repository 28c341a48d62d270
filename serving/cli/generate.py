"""The commands that generate text: `moejax generate` and `moejax chat`."""

import dataclasses
import json
import sys
from collections.abc import Iterator
from typing import Any

import click

from serving.api.client import Client, GenerateOptions
from serving.cli.client_options import client_options
from serving.cli.options import INTERRUPTED, example, sampling_options
from serving.cli.printable import printable
from serving.cli.turns import Turns, WrappedText
from serving.core.prompts import Prompt
from serving.text.tokenizer import Message


@click.command(short_help="Continue a prompt, streaming the text.")
@click.argument("prompt")
@client_options
@sampling_options
@click.option("--json", "as_json", is_flag=True, help="Print the complete output as JSON instead of streaming it.")
@example(
    'moejax generate "The capital of France is" --temperature 0 --max-tokens 8',
    "moejax generate - < prompt.txt",
)
def generate(client: Client, prompt: str, as_json: bool, **options: Any) -> None:
    """Continue PROMPT and stream the text. With "-" as PROMPT, the prompt is read from standard input.

    Ctrl-C cancels the request.
    """
    text = sys.stdin.read() if prompt == "-" else prompt
    if as_json:
        click.echo(json.dumps(dataclasses.asdict(client.generate(text, **_given(options)))))
        return
    try:
        _print_stream(client, text, _given(options))
    except KeyboardInterrupt:
        click.echo(err=True)
        raise SystemExit(INTERRUPTED) from None
    if client.model().has_chat_template:
        click.echo(
            "[this model answers in conversations: `moejax chat` holds one; generate continues a text]", err=True
        )


@click.command(short_help="Talk with the model.")
@client_options
@click.option("--system", help="System message: instructions that precede the conversation.")
@sampling_options
@example('moejax chat --system "Answer in one sentence." --temperature 0.7')
def chat(client: Client, system: str | None, **options: Any) -> None:
    """Talk with the model. Ctrl-C stops an answer, Ctrl-D ends the conversation, /reset starts a new one."""
    first = [Message("system", system)] if system else []
    history = list(first)
    model = client.model().name
    click.echo(f"{model} at {client.address}. Ctrl-C stops an answer, Ctrl-D ends, /reset starts again.", err=True)
    turns = Turns(model) if sys.stdin.isatty() and sys.stdout.isatty() else None
    for text in _user_turns(turns):
        if text == "/reset":
            history = list(first)
            continue
        history.append(Message("user", text))
        try:
            history.append(Message("assistant", _print_stream(client, history, _given(options), turns)))
        except KeyboardInterrupt:
            click.echo(" [stopped]", err=True)
            history.pop()


def _given(options: dict[str, Any]) -> GenerateOptions:
    """The options that were given on the command line; the others have the server's defaults."""
    given: Any = {name: value for name, value in options.items() if value not in (None, ())}
    return given


def _user_turns(turns: Turns | None) -> Iterator[str]:
    """The lines that the user types, until the end of the input."""
    while True:
        try:
            text = (input() if turns is None else turns.ask()).strip()
        except EOFError:
            return
        except KeyboardInterrupt:
            click.echo(err=True)
            continue
        if text:
            yield text


def _print_stream(client: Client, prompt: Prompt, options: GenerateOptions, turns: Turns | None = None) -> str:
    """Print an output as it comes, and return it."""
    stream, parts = client.stream(prompt, **options), []
    lines = None if turns is None else turns.begin()
    try:
        for chunk in stream:
            if chunk.reasoning and sys.stdout.isatty():
                click.secho(_shown(chunk.reasoning, lines), dim=True, nl=False)
            if chunk.text:
                parts.append(chunk.text)
                click.echo(_shown(chunk.text, lines), nl=False)
                sys.stdout.flush()
    finally:
        stream.cancel()
        click.echo("" if lines is None else lines.flush())
    if stream.complete is not None and sys.stderr.isatty():
        done = stream.complete
        epochs = f", epochs {', '.join(map(str, done.epochs))}" if len(done.epochs) > 1 else ""
        labels = [label for label, _ in done.weights_versions]
        weights = f", weights {' then '.join(labels)}" if len(labels) > 1 else ""
        click.secho(f"[{done.completion_tokens} tokens, {done.reason}{epochs}{weights}]", dim=True, err=True)
    return "".join(parts)


def _shown(text: str, lines: WrappedText | None) -> str:
    return printable(text) if lines is None else lines.push(text)
