"""The `moejax` command line."""
