"""Edges: processes that hold the clients' connections, and how they talk to the front."""
