"""Switches the weights of a server under load while its ranks are killed, and checks the laws of a switch.

Streams run all the time. Each switch brings the next of three versions of a model in (the model, and two perturbed
copies); some ranks are killed with SIGKILL at random instants of it. Afterwards every run of tokens that one version
computed is compared with an undisturbed server of that version, which is given the same prompt and the tokens before.
The program ends with 1 when a law is broken: a request failed, a token is not its version's, a version came back, or
something was compiled.
"""

import argparse
import concurrent.futures
import contextlib
import dataclasses
import random
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import jax
import numpy as np

from benchmarks.command import parser, write_json
from moejax.checkpoint.checkpoint import load_params, save_model
from moejax.checkpoint.manifest import Manifest
from moejax.config.model_config import ModelConfig
from planner.inputs.shipped import shipped
from serving.api.client import Client
from serving.errors import MoejaxError
from serving.protocol.events import Event
from serving.server import Server

VERSIONS = 3
"""Different sets of weights; switches go round."""
AT_ONCE = 16
"""Runs of tokens that are compared at once."""
NOISE = 0.05
"""Standard deviation of the perturbation, relative to that of each tensor."""


@dataclasses.dataclass(frozen=True)
class Ask:
    """A request of the load."""

    prompt: tuple[int, ...]
    temperature: float
    seed: int
    tokens: int


@dataclasses.dataclass
class Answer:
    """The answer to a request: its tokens, the label of the weights of each, and when each came."""

    ask: Ask
    tokens: list[int] = dataclasses.field(default_factory=list)
    versions: list[str] = dataclasses.field(default_factory=list)
    times: list[float] = dataclasses.field(default_factory=list)
    error: str = ""

    def runs(self) -> Iterator[tuple[int, int, str]]:
        """Runs of tokens of one version: first, end, label."""
        first = 0
        for at in range(1, len(self.versions) + 1):
            if at == len(self.versions) or self.versions[at] != self.versions[first]:
                yield first, at, self.versions[first]
                first = at


def perturbed(folder: Path, target: Path, seed: int) -> None:
    """Write a copy of a model folder with other weights, in the same number format."""
    cfg, draw = ModelConfig.load(folder), np.random.default_rng(seed)
    (dtype,) = {tensor.dtype for tensor in Manifest.load(folder).tensors.values()}

    def other(leaf: np.ndarray) -> np.ndarray:
        return (leaf + NOISE * leaf.std() * draw.standard_normal(leaf.shape)).astype(dtype)

    save_model(
        target,
        cfg,
        jax.tree.map(other, load_params(folder)),
        tokenizer_json=(folder / "tokenizer.json").read_text(),
        chat_template=(folder / "chat_template.jinja").read_text(),
    )


class Load:
    """Streams that run one after the other in so many threads until they are stopped."""

    def __init__(self, address: str, streams: int, tokens: int) -> None:
        self.answers: list[Answer] = []
        self._address, self._tokens = address, tokens
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(number,)) for number in range(streams)]

    def __enter__(self) -> "Load":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _run(self, number: int) -> None:
        turn = 0
        with Client(self._address) as client:
            while not self._stop.is_set():
                prompt = tuple((7 * number + 3 * at + 11 * turn) % 500 + 5 for at in range(24))
                answer = Answer(Ask(prompt, float(number % 2), 100 * number + turn, self._tokens))
                self.answers.append(answer)
                read(client, answer)
                turn += 1


def read(client: Client, answer: Answer) -> None:
    """Send a request and read its stream."""
    ask = answer.ask
    try:
        for chunk in client.stream(
            list(ask.prompt), temperature=ask.temperature, seed=ask.seed, max_tokens=ask.tokens, ignore_eos=True
        ):
            answer.tokens += chunk.token_ids
            answer.versions += [chunk.weights_version] * len(chunk.token_ids)
            answer.times += [time.monotonic()] * len(chunk.token_ids)
    except MoejaxError as error:
        answer.error = f"{type(error).__name__}: {error}"


def wrong_tokens(client: Client, runs: Sequence[tuple[Answer, int, int]]) -> list[str]:
    """The runs of tokens, (answer, first, end), that a server of their version does not compute."""

    def differs(run: tuple[Answer, int, int]) -> str | None:
        answer, first, end = run
        ask = answer.ask
        again = Answer(dataclasses.replace(ask, prompt=(*ask.prompt, *answer.tokens[:first]), tokens=end - first))
        read(client, again)
        if again.error or again.tokens != answer.tokens[first:end]:
            return f"tokens {first} to {end} of a stream with seed {ask.seed}: {again.error or again.tokens}"
        return None

    with concurrent.futures.ThreadPoolExecutor(AT_ONCE) as pool:
        return [text for text in pool.map(differs, runs) if text is not None]


def broken_laws(answers: Iterable[Answer], order: Sequence[str]) -> list[str]:
    """Laws that the answers alone show to be broken; `order` has the labels in the order of the switches."""
    found = []
    for answer in answers:
        if answer.error:
            found.append(f"a request failed: {answer.error}")
        elif len(answer.tokens) != answer.ask.tokens:
            found.append(f"a stream has {len(answer.tokens)} of {answer.ask.tokens} tokens")
        numbers = [order.index(label) for label in answer.versions]
        if numbers != sorted(numbers):
            found.append(f"versions go back within a stream: {answer.versions}")
    return found


def switch_under_load(server: Server, folders: Sequence[Path], options: argparse.Namespace) -> tuple[Load, list[str]]:
    """Make the switches; returns the load, and the labels in the order in which they came into force."""
    draw, order = random.Random(options.seed), ["0"]
    with Client(server) as client, Load(server.address, options.streams, options.tokens) as load:
        time.sleep(0.5)
        for number in range(1, options.switches + 1):
            wait_until(lambda: all(rank.state == "serving" for rank in client.status().ranks))
            timers = []
            if draw.random() < options.kills:
                rank, after = draw.randrange(options.ranks), draw.uniform(0.0, options.within_s)
                timers.append(threading.Timer(after, kill, (server.address, rank)))
                timers[-1].start()
            running = draw.choice(("switch", "finish")) if options.running == "both" else options.running
            model = str(folders[number % len(folders)])
            client.apply("weights", model=model, version=f"v{number}", running=running)
            order.append(f"v{number}")
            print(f"switch {number}: {running}{', with a kill' if timers else ''}", flush=True)
            for timer in timers:
                timer.join()
    return load, order


def kill(address: str, rank: int) -> None:
    """Kill a rank, if it lives."""
    with Client(address) as client, contextlib.suppress(MoejaxError):
        client.kill(rank)


def wait_until(holds: Callable[[], bool], limit_s: float = 120.0) -> None:
    """Poll until something holds. Raises TimeoutError."""
    end = time.monotonic() + limit_s
    while not holds():
        if time.monotonic() > end:
            raise TimeoutError(f"not within {limit_s:.0f} s")
        time.sleep(0.02)


def check(answers: Sequence[Answer], folders: Sequence[Path], order: Sequence[str]) -> list[str]:
    """Compare each run of tokens with an undisturbed server of its version, one server after the other. One rank is
    enough: no token depends on the number of ranks."""
    wrong = []
    for at, folder in enumerate(folders):
        runs = [
            (answer, first, end)
            for answer in answers
            for first, end, label in answer.runs()
            if order.index(label) % len(folders) == at
        ]
        with Server(model=str(folder), ranks=1) as server, Client(server) as client:
            wrong += wrong_tokens(client, runs)
        print(f"{len(runs)} runs of tokens of {folder.name} compared", flush=True)
    return wrong


def main() -> int:
    """Make the switches, print the laws; 1 when one is broken."""
    line = parser("benchmarks.weights", __doc__)
    line.add_argument("--switches", type=int, default=100)
    line.add_argument("--ranks", type=int, default=4)
    line.add_argument("--streams", type=int, default=8)
    line.add_argument("--tokens", type=int, default=48, help="tokens of each stream")
    line.add_argument("--kills", type=float, default=0.5, help="share of the switches with a kill")
    line.add_argument("--within-s", type=float, default=6.0, help="seconds from the instruction to a kill, at most")
    line.add_argument("--running", choices=("switch", "finish", "both"), default="both")
    line.add_argument("--seed", type=int, default=0)
    line.add_argument("--json", type=Path, help="write the result to this file")
    options = line.parse_args()
    base = shipped("models/tiny")
    with tempfile.TemporaryDirectory(prefix="moejax-weights-") as folder:
        folders = [base, *(Path(folder) / f"tiny-{number}" for number in range(1, VERSIONS))]
        for number, target in enumerate(folders[1:], 1):
            perturbed(base, target, number)
        with Server(model=str(base), ranks=options.ranks, chaos=True) as server:
            load, order = switch_under_load(server, folders, options)
            with Client(server) as client:
                status = client.status()
                events = [event for event in _past(client) if event.kind == "weights_switched"]
        laws = broken_laws(load.answers, order)
        laws += check(load.answers, folders, order)
    if status.compiles_after_ready:
        laws.append(f"{status.compiles_after_ready} programs were compiled")
    gaps = sorted(later - at for each in load.answers for at, later in zip(each.times, each.times[1:], strict=False))
    pauses = sorted(event.phases.get("adopt", 0.0) for event in events)
    result = {
        "switches": len(events),
        "requests": len(load.answers),
        "tokens": sum(len(answer.tokens) for answer in load.answers),
        "across_a_switch": sum(len(list(answer.runs())) > 1 for answer in load.answers),
        "median_gap_ms": 1e3 * gaps[len(gaps) // 2],
        "longest_gap_ms": 1e3 * gaps[-1],
        "median_pause_ms": pauses[len(pauses) // 2],
        "longest_pause_ms": pauses[-1],
        "recoveries": status.recoveries,
        "broken_laws": laws,
    }
    for name, value in result.items():
        print(f"{name:18} {value if not isinstance(value, float) else f'{value:.1f}'}")
    write_json(options.json, result)
    return 1 if laws else 0


def _past(client: Client) -> Iterator[Event]:
    """The events so far."""
    with contextlib.suppress(MoejaxError):
        yield from client.watch(0, timeout_s=1.0)


if __name__ == "__main__":
    sys.exit(main())
