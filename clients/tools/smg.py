# /// script
# dependencies = ["smg==1.13.0", "openai==3.57.0", "anthropic==2.14.0"]
# [tool.clients]
# name = "smg"
# ///
"""The Shepherd Model Gateway with this server as its worker, over HTTP and over vLLM's gRPC, where the gateway makes
tokens and text itself with the tokenizer that the server sends."""

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

import anthropic
import openai

from clients import trials
from clients.trials import MESSAGES, PROMPT, TOKENS, background, free_port, same, trial, until_answers

CHAT = {"model": trials.model(), "messages": MESSAGES, "max_tokens": TOKENS, "temperature": 0}


@contextlib.contextmanager
def gateway(worker: str, *more: str) -> Iterator[str]:
    """The address of a gateway to a worker, while the block lasts."""
    port = free_port()
    words = ("smg", "launch", "--worker-urls", worker, "--host", "127.0.0.1", "--port", str(port), *more)
    words += ("--prometheus-port", str(free_port()))
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "smg.log"
        running = background(words, log)
        try:
            until_answers(f"http://127.0.0.1:{port}/v1/models", running, log)
            yield f"http://127.0.0.1:{port}"
        finally:
            running.terminate()
            running.wait()
            print(log.read_text()[-8000:], file=trials.sys.stderr)


def check_chat(url: str) -> None:
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    same(client.chat.completions.create(**CHAT).choices[0].message.content, trials.chat())
    chunks = client.chat.completions.create(**CHAT, stream=True)
    same("".join(c.choices[0].delta.content or "" for c in chunks if c.choices), trials.chat())


def check_completions(url: str) -> None:
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    asked = {"model": trials.model(), "prompt": PROMPT, "max_tokens": TOKENS, "temperature": 0}
    same(client.completions.create(**asked).choices[0].text, trials.completion())


def check_responses(url: str) -> None:
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    asked = {"model": trials.model(), "input": MESSAGES[0]["content"], "max_output_tokens": TOKENS, "temperature": 0}
    same(client.responses.create(**asked).output_text, trials.chat())


def check_messages(url: str) -> None:
    client = anthropic.Anthropic(base_url=url, api_key="none", max_retries=0)
    asked = {"model": trials.model(), "messages": MESSAGES, "max_tokens": TOKENS, "extra_body": {"temperature": 0}}
    same(client.messages.create(**asked).content[0].text, trials.chat())


CHECKS = {"chat, whole and streamed": check_chat, "completions": check_completions}
CHECKS |= {"Responses API": check_responses, "Anthropic messages": check_messages}
GATEWAYS = {"HTTP": (trials.base(),), "gRPC": (f"grpc://{trials.grpc_address()}",)}


def add(way: str, what: str) -> None:
    @trial(f"{way}: {what}")
    def check() -> None:
        CHECKS[what](URLS[way])


if __name__ == "__main__":
    with contextlib.ExitStack() as stack:
        URLS = {way: stack.enter_context(gateway(*words)) for way, words in GATEWAYS.items()}
        for way in GATEWAYS:
            for what in CHECKS:
                add(way, what)
        trials.main()
