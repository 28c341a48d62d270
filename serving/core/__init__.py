"""The loop that owns the engine's state, and around it the request log, output streams, reports and request
processing."""
