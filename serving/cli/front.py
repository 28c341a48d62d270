"""The process of a supervised front, started as `python -m serving.cli.front`.

It makes all imports, waits for a line on its standard input, and serves then.
"""

import signal
import sys

from serving.config import Settings
from serving.foreground import serve
from serving.launch.process import die_with_parent
from serving.launch.run_folder import ENV_RUN, RunFolder


def main() -> int:
    """Serve with the settings in the run folder. Returns the exit status."""
    die_with_parent()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # Ctrl-C reaches all processes; the supervisor ends this one
    run = RunFolder.of_this_front()
    assert run is not None, f"{ENV_RUN} is not set"
    run.note("waiting")
    if not sys.stdin.readline():
        return 0
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    return serve(Settings.load(run.settings, {}), run)


if __name__ == "__main__":
    raise SystemExit(main())
