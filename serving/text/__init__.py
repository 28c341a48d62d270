"""Text in and out: tokenizers, chat templates, structured output, tool calls, validation."""
