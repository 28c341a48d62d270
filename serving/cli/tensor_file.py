"""Reads the tensors of a safetensors file one by one, without its whole bytes in memory."""

import json
import math
from collections.abc import Iterator
from pathlib import Path

import ml_dtypes
import numpy as np

from serving.errors import InvalidRequest

DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "F8_E8M0": ml_dtypes.float8_e8m0fnu,
    "U8": np.uint8,
    "I8": np.int8,
    "I32": np.int32,
    "I64": np.int64,
    "BOOL": np.bool_,
}
"""Number formats by their names in safetensors."""


def read_tensors(file: Path) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors of a file, in its order. Raises InvalidRequest for one that is damaged, or of an unknown format."""
    try:
        with file.open("rb") as opened:
            size = int.from_bytes(opened.read(8), "little")
            header = json.loads(opened.read(min(size, file.stat().st_size)))
        header.pop("__metadata__", None)
        found = [
            (name, np.dtype(DTYPES[each["dtype"]]), each["shape"], each["data_offsets"][0])
            for name, each in header.items()
        ]
        for name, dtype, shape, start in found:
            length = math.prod(shape) * dtype.itemsize
            numbers = np.fromfile(file, np.uint8, length, offset=8 + size + start)
            yield name, numbers.view(dtype).reshape(shape)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InvalidRequest(f"{file} is no whole safetensors file ({type(error).__name__}: {error}).") from None
