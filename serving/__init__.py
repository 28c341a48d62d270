"""The server: requests in, tokens out, ranks that may die in between."""
