"""Programs that make, prepare, inspect and train models."""
