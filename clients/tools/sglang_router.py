# /// script
# dependencies = ["sglang-router==0.3.2", "openai==3.57.0"]
# [tool.clients]
# name = "sglang-router"
# ///
"""SGLang's router with this server as its worker: completions and chat through it."""

import tempfile
from pathlib import Path

import openai

from clients import trials
from clients.trials import MESSAGES, PROMPT, TOKENS, background, free_port, same, trial, until_answers

PORT, METRICS = free_port(), free_port()
CLIENT = openai.OpenAI(base_url=f"http://127.0.0.1:{PORT}/v1", api_key="none", max_retries=0)
WORDS = ("python", "-m", "sglang_router.launch_router", "--worker-urls", trials.base(), "--host", "127.0.0.1")
WORDS += ("--port", str(PORT), "--prometheus-port", str(METRICS), "--model-path", trials.model_folder())


@trial("completions, whole and streamed")
def completions() -> None:
    asked = {"model": trials.model(), "prompt": PROMPT, "max_tokens": TOKENS, "temperature": 0}
    same(CLIENT.completions.create(**asked).choices[0].text, trials.completion())
    same("".join(c.choices[0].text for c in CLIENT.completions.create(**asked, stream=True)), trials.completion())


@trial("chat, whole and streamed")
def chat() -> None:
    asked = {"model": trials.model(), "messages": MESSAGES, "max_tokens": TOKENS, "temperature": 0}
    same(CLIENT.chat.completions.create(**asked).choices[0].message.content, trials.chat())
    chunks = CLIENT.chat.completions.create(**asked, stream=True)
    same("".join(c.choices[0].delta.content or "" for c in chunks if c.choices), trials.chat())


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        router = background(WORDS, Path(folder) / "router.log")
        try:
            until_answers(f"http://127.0.0.1:{PORT}/v1/models", router, Path(folder) / "router.log")
            trials.main()
        finally:
            router.terminate()
