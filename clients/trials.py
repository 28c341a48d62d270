"""Trials of a tool: each uses the tool as its users do and checks the answer. Only the standard library is used here,
because this module runs in the environments of the tools."""

import json
import os
import socket
import subprocess
import sys
import time
import traceback
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

PROMPT = "ROMEO:"
TOKENS = 12
MESSAGES = [{"role": "user", "content": "Good morrow, cousin."}]
WEATHER = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Rome"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
"""Parameters of a tool, and the form of a structured answer."""

_TRIALS: list[tuple[str, Callable[[], str | None]]] = []
_SHOWN_LINES = 3


class Lacks(Exception):
    """Raised by a trial when the tool itself lacks what the trial is about; the text says what."""


def trial(what: str) -> Callable[[Callable[[], str | None]], Callable[[], str | None]]:
    """Adds a function to the trials of this program. It returns a remark, or None; an exception is a failure."""

    def add(function: Callable[[], str | None]) -> Callable[[], str | None]:
        _TRIALS.append((what, function))
        return function

    return add


def main() -> None:
    """Runs the trials in order and prints one line of JSON for each: what was tried, the result, a remark."""
    for what, function in _TRIALS:
        result, remark = "works", None
        try:
            remark = function()
        except Lacks as error:
            result, remark = "lacks", str(error)
        except BaseException as error:
            result, remark = "fails", f"{type(error).__name__}: {error}"
            traceback.print_exc()
        sys.stderr.flush()
        print(json.dumps({"trial": what, "result": result, "remark": remark}), flush=True)


def base() -> str:
    """http://host:port of the server under test."""
    return os.environ["CLIENTS_URL"]


def grpc_address() -> str:
    """host:port of its gRPC."""
    return os.environ["CLIENTS_GRPC"]


def model() -> str:
    """The name under which it serves its model."""
    return os.environ["CLIENTS_MODEL"]


def model_folder() -> str:
    """The folder of the model: its tokenizer is there."""
    return os.environ["CLIENTS_FOLDER"]


def call(path: str, body: Any = None, *, url: str | None = None, timeout: float = 60) -> Any:
    """The server's answer to a plain request, read as JSON."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request((url or base()) + path, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=timeout) as answer:
        return json.load(answer)


def completion() -> str:
    """The right continuation of PROMPT: TOKENS tokens, the likeliest ones."""
    body = {"model": model(), "prompt": PROMPT, "max_tokens": TOKENS, "temperature": 0}
    return call("/v1/completions", body)["choices"][0]["text"]


def chat() -> str:
    """The right answer to MESSAGES: TOKENS tokens, the likeliest ones."""
    body = {"model": model(), "messages": MESSAGES, "max_tokens": TOKENS, "temperature": 0}
    return call("/v1/chat/completions", body)["choices"][0]["message"]["content"]


def same(found: Any, right: Any) -> None:
    """Raises AssertionError naming both values when they differ."""
    if found != right:
        raise AssertionError(f"the answer is {found!r}; right is {right!r}")


def check_weather(value: Any) -> None:
    """Raises AssertionError when a value is not of the form WEATHER."""
    good = isinstance(value, dict) and set(value) == {"city", "days"} and value["city"] in ("Paris", "Rome")
    if not good or value["days"] not in range(1, 10):
        raise AssertionError(f"{value!r} does not have the form {WEATHER}")


def command(*words: str, timeout: float = 240, environment: dict[str, str] | None = None) -> str:
    """The standard output of a command of the tool's environment. Raises AssertionError with the end of its output when
    it fails."""
    return outputs(*words, timeout=timeout, environment=environment)[0]


def outputs(*words: str, timeout: float = 240, environment: dict[str, str] | None = None) -> tuple[str, str]:
    """The standard output and the error output of such a command."""
    program = Path(sys.executable).parent / words[0]
    first = str(program) if program.exists() else words[0]
    done = subprocess.run(
        [first, *words[1:]], capture_output=True, text=True, timeout=timeout, env=os.environ | (environment or {})
    )
    sys.stderr.write(done.stdout[-20_000:] + done.stderr[-20_000:])
    if done.returncode != 0:
        raise AssertionError(f"{words[0]} ended with {done.returncode}: {last_lines(done.stderr or done.stdout)}")
    return done.stdout, done.stderr


def last_lines(text: str, lines: int = _SHOWN_LINES) -> str:
    """The end of an output."""
    return " / ".join(line.strip() for line in text.strip().splitlines()[-lines:])


def background(words: Sequence[str], log: Path, environment: dict[str, str] | None = None) -> "subprocess.Popen[bytes]":
    """A program of the tool's environment that runs until the caller ends it, its output in `log`."""
    program = Path(sys.executable).parent / words[0]
    first = str(program) if program.exists() else words[0]
    with log.open("wb") as output:
        return subprocess.Popen(
            [first, *words[1:]], stdout=output, stderr=subprocess.STDOUT, env=os.environ | (environment or {})
        )


def free_port() -> int:
    """A TCP port that nothing listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def until_answers(
    url: str, running: "subprocess.Popen[bytes]", log: Path, seconds: float = 90, key: str = "none"
) -> None:
    """Wait until a program answers at an address. Raises AssertionError with the end of its output when it does not."""
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {key}"})
    end = time.monotonic() + seconds
    while time.monotonic() < end and running.poll() is None:
        try:
            with urllib.request.urlopen(request, timeout=5) as answer:
                if json.load(answer).get("data"):
                    return
        except (OSError, ValueError):
            pass
        time.sleep(0.5)
    raise AssertionError(f"nothing answers at {url}: {last_lines(log.read_text())}")
