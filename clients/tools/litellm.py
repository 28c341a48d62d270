# /// script
# dependencies = ["anthropic==2.14.0", "litellm-enterprise", "litellm-proxy-extras"]
# [tool.clients]
# name = "litellm, SDK and proxy"
# partial = "litellm[proxy]==1.110.2"
# leave_out = ["litellm-proxy", "litellm-enterprise", "litellm-proxy-extras"]
# minutes = 8
# ///
"""LiteLLM as a library, and as a proxy in front of this server. Of the proxy's requirements PyPI lacks one, and
has two others in neighbouring versions only."""

import asyncio
import json
import secrets
import tempfile
from pathlib import Path

import anthropic
import litellm
import openai

from clients import trials
from clients.trials import (
    MESSAGES,
    PROMPT,
    TOKENS,
    WEATHER,
    background,
    check_weather,
    free_port,
    same,
    trial,
    until_answers,
)

SERVED = {"api_base": f"{trials.base()}/v1", "api_key": "none", "temperature": 0, "max_tokens": TOKENS}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": WEATHER}}
KEY = f"sk-{secrets.token_hex(16)}"
CONFIG = f"""\
model_list:
  - model_name: served
    litellm_params: {{model: hosted_vllm/{trials.model()}, api_base: "{trials.base()}/v1", api_key: none}}
  - model_name: openai
    litellm_params: {{model: openai/{trials.model()}, api_base: "{trials.base()}/v1", api_key: none}}
general_settings: {{master_key: {KEY}}}
"""
PORT = free_port()
PROXY = f"http://127.0.0.1:{PORT}"
OPENAI = openai.OpenAI(base_url=f"{PROXY}/v1", api_key=KEY, max_retries=0)


@trial("SDK: completion, whole, streamed and asynchronous")
def chat() -> None:
    for provider in ("hosted_vllm", "openai"):
        asked = {"model": f"{provider}/{trials.model()}", "messages": MESSAGES, **SERVED}
        same(litellm.completion(**asked).choices[0].message.content, trials.chat())
        parts = litellm.completion(**asked, stream=True)
        same("".join(part.choices[0].delta.content or "" for part in parts), trials.chat())
        same(asyncio.run(litellm.acompletion(**asked)).choices[0].message.content, trials.chat())


@trial("SDK: text_completion")
def completions() -> None:
    answer = litellm.text_completion(model=f"text-completion-openai/{trials.model()}", prompt=PROMPT, **SERVED)
    same(answer.choices[0].text, trials.completion())


@trial("SDK: a required tool call, and a response format")
def tools() -> None:
    # As hosted_vllm it takes additionalProperties out of schemas, and a small model then invents properties.
    asked = {"model": f"openai/{trials.model()}", "messages": MESSAGES, **SERVED, "max_tokens": 60}
    (call,) = litellm.completion(**asked, tools=[TOOL], tool_choice="required").choices[0].message.tool_calls
    check_weather(json.loads(call.function.arguments))
    form = {"type": "json_schema", "json_schema": {"name": "weather", "schema": WEATHER, "strict": True}}
    check_weather(json.loads(litellm.completion(**asked, response_format=form).choices[0].message.content))


def check_start(text: str) -> str:
    """Raises AssertionError when the answer does not begin with the right one."""
    assert text.startswith(trials.chat()), text
    return "it asks for at least 16 tokens"


@trial("SDK: responses")
def responses() -> str:
    asked = {"api_base": f"{trials.base()}/v1", "api_key": "none", "temperature": 0, "max_output_tokens": TOKENS}
    answer = litellm.responses(model=f"openai/{trials.model()}", input=MESSAGES[0]["content"], **asked)
    return check_start("".join(part.text for item in answer.output for part in item.content))


@trial("SDK: a long prompt and an unknown model are recognised")
def errors() -> None:
    asked = {"model": f"hosted_vllm/{trials.model()}", "messages": MESSAGES, **SERVED}
    wrong = {
        litellm.ContextWindowExceededError: {"messages": [{"role": "user", "content": "long " * 100_000}]},
        litellm.NotFoundError: {"model": "hosted_vllm/another"},
    }
    for error, change in wrong.items():
        try:
            litellm.completion(**asked | change)
        except error:
            continue
        raise AssertionError(f"{change.keys()} raised no {error.__name__}")


@trial("proxy: chat, whole and streamed")
def proxy_chat() -> None:
    asked = {"model": "served", "messages": MESSAGES, "max_tokens": TOKENS, "temperature": 0}
    same(OPENAI.chat.completions.create(**asked).choices[0].message.content, trials.chat())
    chunks = OPENAI.chat.completions.create(**asked, stream=True)
    same("".join(c.choices[0].delta.content or "" for c in chunks if c.choices), trials.chat())


@trial("proxy: Responses API")
def proxy_responses() -> str:
    asked = {"input": MESSAGES[0]["content"], "max_output_tokens": TOKENS, "temperature": 0}
    return check_start(OPENAI.responses.create(model="openai", **asked).output_text)


@trial("proxy: Anthropic messages")
def proxy_messages() -> None:
    client = anthropic.Anthropic(base_url=PROXY, api_key=KEY, max_retries=0)
    greedy = {"temperature": 0}
    answer = client.messages.create(model="served", messages=MESSAGES, max_tokens=TOKENS, extra_body=greedy)
    same(answer.content[0].text, trials.chat())


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        config, log = Path(folder) / "config.yaml", Path(folder) / "proxy.log"
        config.write_text(CONFIG)
        local = {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "NO_DOCS": "True"}
        words = ("litellm", "--config", str(config), "--host", "127.0.0.1", "--port", str(PORT))
        proxy = background(words, log, local)
        try:
            until_answers(f"{PROXY}/v1/models", proxy, log, key=KEY)
            trials.main()
        finally:
            proxy.terminate()
            print(log.read_text()[-8000:], file=trials.sys.stderr)
