"""moejax beside llama.cpp and vLLM on this machine: the same weights, prompts and client, in turn."""
