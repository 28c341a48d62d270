"""`python -m serving` is `moejax`."""

from serving.cli import main

main()
