"""Access to the server: API keys, join tokens, TLS, and limits."""
