"""Other people's clients and tools, each installed from its registry and tried with a real server (docs/clients.md)."""
