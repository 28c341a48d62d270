"""The inputs of a plan: cluster, model, traffic."""
