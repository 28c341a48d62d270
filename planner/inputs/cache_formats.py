"""The formats in which `moejax serve` holds keys and values (`--kv-cache-type`)."""

CACHE_FORMATS = ("float32", "bfloat16", "int8", "fp8")
SCALED_CACHE_FORMATS = ("int8", "fp8")
"""Those with a float32 scale for each key and value of a head."""
