"""The surfaces that callers use: HTTP, gRPC, and the Python client."""
