# /// script
# dependencies = ["llm==0.36"]
# [tool.clients]
# name = "llm"
# ///
"""Simon Willison's command line `llm`, with the server in its extra-openai-models.yaml."""

import json
import tempfile
from pathlib import Path

from clients import trials
from clients.trials import MESSAGES, PROMPT, TOKENS, WEATHER, check_weather, command, same, trial

FOLDER = Path(tempfile.mkdtemp())
OPTIONS = ("-o", "max_tokens", str(TOKENS), "-o", "temperature", "0")
MODEL = """\
- model_id: {id}
  model_name: {name}
  api_base: "{base}/v1"
  supports_schema: true
  supports_tools: true
  completion: {completion}
"""


def llm(*words: str) -> str:
    names = {"id": "served", "completion": "false"}, {"id": "served-text", "completion": "true"}
    models = "".join(MODEL.format(base=trials.base(), name=trials.model(), **each) for each in names)
    (FOLDER / "extra-openai-models.yaml").write_text(models)
    return command("llm", *words, environment={"LLM_USER_PATH": str(FOLDER), "OPENAI_API_KEY": "none"})


@trial("a prompt, streamed and with --no-stream")
def prompt() -> None:
    text = MESSAGES[0]["content"]
    same(llm("-m", "served", *OPTIONS, text).strip(), trials.chat().strip())
    same(llm("-m", "served", "--no-stream", *OPTIONS, text).strip(), trials.chat().strip())


@trial("a completion model")
def completion() -> None:
    same(llm("-m", "served-text", *OPTIONS, PROMPT).strip(), trials.completion().strip())


@trial("--schema")
def schema() -> None:
    text = llm("-m", "served", "--schema", json.dumps(WEATHER), "-o", "max_tokens", "60", MESSAGES[0]["content"])
    check_weather(json.loads(text))


@trial("-T llm_version (a tool), and -c, which goes on with the conversation")
def tools() -> None:
    llm("-m", "served", "-T", "llm_version", *OPTIONS, MESSAGES[0]["content"])
    assert llm("-c", *OPTIONS, "And you?").strip()


if __name__ == "__main__":
    trials.main()
