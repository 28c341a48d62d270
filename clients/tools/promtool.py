# /// script
# [tool.clients]
# name = "promtool"
# debian = ["prometheus=2.42.0+ds-5+deb12u1"]
# ///
"""Prometheus' promtool: the metrics that the server exports, and the alert rules of this repository."""

import os
import subprocess
import urllib.request
from pathlib import Path

from clients import trials
from clients.trials import trial

PROMTOOL = Path(os.environ["CLIENTS_ENVIRONMENT"]) / "usr" / "bin" / "promtool"
RULES = Path(__file__).parents[2] / "deploy" / "alerts.yaml"


VLLM_NAMES = "vllm:"
LINT = 3
"""Exit code of `check metrics` when it can read everything and would have other names."""


def promtool(*words: str, text: bytes = b"") -> tuple[int, str]:
    done = subprocess.run([PROMTOOL, *words], input=text, capture_output=True, timeout=60)
    return done.returncode, (done.stdout + done.stderr).decode()


@trial("check metrics, of /metrics")
def metrics() -> str:
    trials.completion()  # so that the histograms have samples
    with urllib.request.urlopen(f"{trials.base()}/metrics") as answer:
        code, output = promtool("check", "metrics", text=answer.read())
    assert code in (0, LINT), output
    ours = [line for line in output.splitlines() if not line.startswith(VLLM_NAMES)]
    assert ours == [], ours
    return "its only remark is about the colon in the names of vLLM's metrics"


@trial("check rules, of deploy/alerts.yaml")
def rules() -> str:
    code, output = promtool("check", "rules", str(RULES))
    assert code == 0, output
    return trials.last_lines(output, 1)


if __name__ == "__main__":
    trials.main()
