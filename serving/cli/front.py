"""A front whose supervisor is the parent of this process. Started as `python -m serving.front`; with all imports
made it waits for a line on its standard input, and serves then.
"""

import signal
import sys

from serving.app import serve
from serving.config import Settings
from serving.orphans import die_with_parent
from serving.run_folder import RUN, RunFolder


def main() -> int:
    """Serve with the settings of the folder; the exit status."""
    die_with_parent()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # a terminal tells the whole group; the supervisor ends who stands by
    if not sys.stdin.readline():
        return 0
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    run = RunFolder.of_this_front()
    assert run is not None, f"{RUN} is not set"
    return serve(Settings.load(run.settings, {}), run)


if __name__ == "__main__":
    raise SystemExit(main())
