"""The planner's predictions beside measured settings, the same as `moejax plan accuracy`.

python -m benchmarks.accuracy DATA.csv [--json] [--engine NAME] [--no-refit]
"""

from __future__ import annotations

import sys

from planner.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["accuracy", *sys.argv[1:]]))
