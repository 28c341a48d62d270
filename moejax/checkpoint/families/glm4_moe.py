"""GLM-4.5 (arXiv 2508.06471), the decoder of GLM-4.5V (arXiv 2507.01006), dots.llm1 (arXiv 2506.05767) and Solar Open
(arXiv 2601.07022)."""

from moejax.checkpoint.families.decoder import decoder_names
from moejax.checkpoint.families.deepseek import mtp_names, next_token_layers, shared_expert_names
from moejax.checkpoint.families.family import NameMap, ServedFamily
from moejax.config.model_config import ModelConfig


def names(cfg: ModelConfig) -> NameMap:
    """Their name map."""
    return decoder_names(cfg) | shared_expert_names(cfg) | mtp_names(cfg)


GLM4_MOE = DOTS1 = ServedFamily(names=names, unused=next_token_layers)
GLM4V_MOE = ServedFamily(
    names=names, unused=next_token_layers, moved={"model.": "model.language_model."}, beside=("model.visual.*",)
)
SOLAR_OPEN = ServedFamily(
    names=names, only={"first_k_dense_replace": 0, "use_qk_norm": False}, unused=next_token_layers
)
