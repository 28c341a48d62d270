"""The gRPC services: moejax.v1, vLLM's, health and reflection."""
