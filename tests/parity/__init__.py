"""Our decoder against `transformers`: the same folders, the same tokens, logits of every position, greedy decoding."""
