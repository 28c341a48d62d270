"""Published model families: a config reader and a name map each; the decoder is the same for all.

    cfg = read_config(folder)                 # or the dict of a config.json
    for entry in tensor_names(cfg):           # every array of the parameter tree, layer by layer, expert by expert
        parts = [...]                         # read entry.tensors (name, shape, index on the first axis)
        array = entry.array(parts)            # ours, of entry.shape; goes to entry.path[entry.repeat, entry.expert]
    is_unused(cfg, name)                      # True: in the checkpoint on purpose, and not in the decoder

Names are those of unquantised checkpoints: `X.weight` of a block-scaled float8 checkpoint comes with
`X.weight_scale_inv`, `X` of an MXFP4 one is `X_blocks` and `X_scales`, and shapes are those after dequantising.
"""

from moejax.families.checkpoint import is_unused, tensor_names
from moejax.families.reader import FAMILIES, read_config

__all__ = ["FAMILIES", "is_unused", "read_config", "tensor_names"]
