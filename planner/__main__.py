"""Runs `python -m planner …`, the same as `moejax plan …`."""

import sys

from planner.cli.main import main

sys.exit(main(sys.argv[1:]))
