"""Runs examples/node_client.js: a client in another language that knows only the .proto files."""

import os
import subprocess
from pathlib import Path

from tests.support.published_assets import node_modules

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "examples" / "node_client.js"


def node(address: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The ended process, with its output."""
    environment = os.environ | {"NODE_PATH": str(node_modules())}
    command = ["node", str(SCRIPT), address, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)
