"""The process of one rank; the only package of the server that imports `moejax`."""
