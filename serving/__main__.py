"""Runs the command line: `python -m serving` is the same as `moejax`."""

from serving.cli.main import main

main(prog_name="moejax")
