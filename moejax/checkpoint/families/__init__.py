"""Published model families that are served: a name map each; the decoder is the same for all.

    cfg = read_config(folder)                 # or the dict of a config.json
    for entry in array_sources(cfg):           # every array of the parameter tree, layer by layer, expert by expert
        parts = [...]                         # read entry.tensors (name, shape, index on the first axis)
        array = entry.array(parts)            # ours, of entry.shape; goes to entry.path[entry.repeat, entry.expert]
    is_unused(cfg, name)                      # True: in the checkpoint on purpose, and not in the decoder

Names are those of unquantised checkpoints: `X.weight` of a block-scaled float8 checkpoint comes with
`X.weight_scale_inv`, `X` of an MXFP4 one is `X_blocks` and `X_scales`, and shapes are those after dequantising.
"""

from moejax.checkpoint.families.array_sources import array_sources, is_unused
from moejax.checkpoint.families.reader import SERVED_FAMILIES, WITHOUT_MTP, read_config

__all__ = ["SERVED_FAMILIES", "WITHOUT_MTP", "array_sources", "is_unused", "read_config"]
