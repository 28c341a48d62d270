"""A program for the fork server: it prints what it sees of the world, and ends or waits as its environment says."""

import os
import sys
import time


def main() -> None:
    """Print the parent's pid, the number of threads and the arguments; then end with a code, or wait."""
    print(os.getppid(), len(os.listdir("/proc/self/task")), len(sys.argv), flush=True)
    print("an error", file=sys.stderr, flush=True)
    if "CODE" in os.environ:
        sys.exit(int(os.environ["CODE"]))
    time.sleep(600)


if __name__ == "__main__":
    main()
