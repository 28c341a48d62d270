"""The forms in which published checkpoints store a matrix in few bits, and how each becomes numbers again.

| form | stored | source |
|---|---|---|
| FP8 and int8: numbers times scales | `X`, `X_scale_inv` or `X_scale`; int8 also `X_zero_point` | `scaled` |
| MXFP4, NVFP4: sixteen numbers times scales of groups | `X_blocks`, `X_scales`; `X_packed`, `X_scale` | `fp4` |
| int4 and int8 packed into words of 32 bits | `X_packed`; `qweight`, `qzeros`, `scales` (AWQ, GPTQ) | `integers` |
"""

from moejax.checkpoint.quantized.detection import find_quantized
from moejax.checkpoint.quantized.form import QuantizedTensor, StoredTensor

__all__ = ["QuantizedTensor", "StoredTensor", "find_quantized"]
