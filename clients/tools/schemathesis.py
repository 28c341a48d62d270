# /// script
# dependencies = ["schemathesis==4.32.5"]
# [tool.clients]
# name = "schemathesis"
# minutes = 6
# ///
"""Schemathesis: requests of every operation of /openapi.json, and no answer is a server error."""

import re

from clients import trials
from clients.trials import command, trial


@trial("st run with the check not_a_server_error")
def run() -> str:
    words = ("--checks", "not_a_server_error", "--phases", "examples,fuzzing", "--max-examples", "40")
    output = command("st", "run", f"{trials.base()}/openapi.json", *words, "--request-timeout", "60", timeout=340)
    cases = re.findall(r"(\d+) generated", output)
    assert cases, output[-2000:]
    return f"{cases[-1]} requests"


if __name__ == "__main__":
    trials.main()
