"""A program for the fork server: it prints what it sees of the world, and ends or waits as its environment says."""

import os
import sys
import time


def main() -> int:
    """Print the parent's pid, the number of threads and the arguments; then end with a code, or wait."""
    print(os.getppid(), len(os.listdir("/proc/self/task")), len(sys.argv), flush=True)
    print("an error", file=sys.stderr, flush=True)
    if "ECHO" in os.environ:
        said, given = sys.stdin.readline(), os.read(int(sys.argv[1]), 100)
        print(said.strip(), given.decode(), os.environ.get("OPENBLAS_NUM_THREADS"), flush=True)
    if "CODE" in os.environ:
        return int(os.environ["CODE"])
    time.sleep(600)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
