# /// script
# dependencies = ["locust==2.47.0"]
# [tool.clients]
# name = "locust"
# ///
"""Locust: four users who ask for chat completions for five seconds."""

import json
import tempfile
from pathlib import Path

from clients import trials
from clients.trials import MESSAGES, TOKENS, command, trial

FILE = """\
from locust import HttpUser, task

class Caller(HttpUser):
    @task
    def chat(self):
        with self.client.post("/v1/chat/completions", json={body!r}, catch_response=True) as answer:
            if answer.status_code != 200 or answer.json()["choices"][0]["message"]["content"] != {right!r}:
                answer.failure(answer.text)
"""


@trial("chat completions of 4 users, each answer compared")
def load() -> str:
    body = {"model": trials.model(), "messages": MESSAGES, "max_tokens": TOKENS, "temperature": 0}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "locustfile.py"
        path.write_text(FILE.format(body=body, right=trials.chat()))
        words = ("-f", str(path), "--headless", "-u", "4", "-r", "4", "-t", "5s", "--host", trials.base())
        found = json.loads(command("locust", *words, "--json", "--skip-log"))
    requests, failed = found[0]["num_requests"], found[0]["num_failures"]
    assert requests > 0, found
    assert failed == 0, found
    return f"{requests} requests, none failed"


if __name__ == "__main__":
    trials.main()
