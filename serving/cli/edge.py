"""The process of an edge, forked after its imports or started as `python -m serving.cli.edge FD`.

FD is the descriptor of HTTP's socket.

It serves until its standard input ends. Signals to the whole process group leave it alone, because it is needed until
the front has drained.
"""

import signal
import socket
import sys

from serving.config import Settings
from serving.edge import serve
from serving.launch.process import die_with_parent
from serving.launch.run_folder import ENV_RUN, RunFolder


def main() -> int:
    """Serve with the settings in the run folder. Returns the exit status."""
    die_with_parent()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    run = RunFolder.of_this_front()
    assert run is not None, f"{ENV_RUN} is not set"
    return serve(Settings.load(run.settings, {}), run, socket.socket(fileno=int(sys.argv[1])))


if __name__ == "__main__":
    raise SystemExit(main())
