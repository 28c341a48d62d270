"""The decoder: pure functions over JAX arrays, with the mesh passed in."""
