"""The model and its arrays: pure functions over JAX arrays, with the mesh passed in."""
