"""The view of clients of any OpenAI server when one of its processes dies or hangs (docs/chaos.md)."""
