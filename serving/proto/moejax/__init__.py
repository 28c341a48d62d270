"""Stubs of the proto package moejax."""
