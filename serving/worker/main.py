"""The process of one rank: it attaches to the front that its environment names, and obeys.

python -m serving.worker.main        (started by the front or a host agent, which set the environment)
"""

import faulthandler
import os
import signal

from serving.launch.process import die_with_parent
from serving.launch.rank_channel import RankChannel
from serving.launch.rank_process import ENV_RANK, ENV_STAY, ENV_TOKEN
from serving.worker.front_link import FrontLink
from serving.worker.rank import RankWorker


def main() -> None:
    """Attach to the front named in the environment and obey it."""
    die_with_parent()
    faulthandler.enable()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # a terminal or systemd signals the whole group; the front drains
    channel = RankChannel.from_environment()
    rank = RankWorker(int(os.environ[ENV_RANK]), channel)
    FrontLink(rank, channel, os.environ[ENV_TOKEN], stays=ENV_STAY in os.environ).run()


if __name__ == "__main__":
    main()
