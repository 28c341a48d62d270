"""The process of a supervised front, forked after its imports or started as `python -m serving.cli.front`.

It waits for a line on its standard input, and serves then. While it waits it follows the journal of
the front that serves: so that it need not read all of it when it takes over.
"""

import select
import signal
import sys

from serving.app import journal_folder
from serving.config import Settings
from serving.core.call_history import JournalFollower
from serving.foreground import serve
from serving.launch.process import die_with_parent
from serving.launch.run_folder import ENV_RUN, RunFolder

FOLLOW_S = 0.25
"""Seconds between two readings of the journal."""


def follower_of(settings: Settings, run: RunFolder) -> JournalFollower | None:
    """Follows the journal that the settings want; None without one."""
    folder = journal_folder(settings, run)
    return None if folder is None else JournalFollower(folder, settings.resume_s)


def wait_to_serve(follower: JournalFollower | None) -> bool:
    """Follow the journal until the supervisor says that this front is to serve. False when it has ended instead."""
    pause_s: float | None = 0.0
    while not select.select([sys.stdin], [], [], pause_s)[0]:
        try:
            pause_s = None if follower is None else 0.0 if follower.read() else FOLLOW_S
        except OSError:  # the front that opens the journal says what is wrong with it
            pause_s = None
    return bool(sys.stdin.readline())


def main() -> int:
    """Serve with the settings in the run folder. Returns the exit status."""
    die_with_parent()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # Ctrl-C reaches all processes; the supervisor ends this one
    run = RunFolder.of_this_front()
    assert run is not None, f"{ENV_RUN} is not set"
    run.note("waiting")
    follower = follower_of(Settings.load(run.settings, {}), run)
    if not wait_to_serve(follower):
        return 0
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    return serve(Settings.load(run.settings, {}), run, follower)


if __name__ == "__main__":
    raise SystemExit(main())
