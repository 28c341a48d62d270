"""OpenAI-compatible HTTP, Server-Sent Events, metrics, health and the dashboard."""
