"""The model as data: configuration, parameters, weight formats, KV cache, and the inputs of a step."""
