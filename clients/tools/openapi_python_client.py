# /// script
# dependencies = ["openapi-python-client==0.29.1", "httpx==0.28.1", "attrs", "python-dateutil"]
# [tool.clients]
# name = "openapi-python-client"
# ///
"""openapi-python-client: a client is generated from /openapi.json, and asks for a completion."""

import importlib
import sys
import tempfile
from pathlib import Path

from clients import trials
from clients.trials import PROMPT, TOKENS, outputs, same, trial

FOLDER = Path(tempfile.mkdtemp())


@trial("generate, with no operation left out")
def generate() -> str:
    words = ("--url", f"{trials.base()}/openapi.json", "--output-path", str(FOLDER / "generated"), "--meta", "none")
    output = "".join(outputs("openapi-python-client", "generate", *words, "--overwrite"))
    left_out = [line for line in output.splitlines() if line.startswith(("Unable to", "WARNING"))]
    assert left_out == [], left_out
    return f"{len(list((FOLDER / 'generated' / 'models').glob('*.py'))) - 1} typed models"


@trial("a completion with the generated client")
def completion() -> None:
    sys.path.insert(0, str(FOLDER))
    generated = importlib.import_module("generated")
    (path,) = (FOLDER / "generated" / "api").rglob("create_completion.py")
    name = ".".join(path.relative_to(FOLDER).with_suffix("").parts)
    models = importlib.import_module("generated.models")
    body = models.CompletionBody.from_dict(
        {"model": trials.model(), "prompt": PROMPT, "max_tokens": TOKENS, "temperature": 0}
    )
    answer = importlib.import_module(name).sync(client=generated.Client(base_url=trials.base()), body=body)
    same(answer.choices[0].text, trials.completion())


if __name__ == "__main__":
    trials.main()
