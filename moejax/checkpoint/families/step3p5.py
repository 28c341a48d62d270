"""Step-3.5-Flash, and the decoder of Step-3.7-Flash, which stands beside a vision tower (StepFun, 2026). Scales of
norms are published less 1, and the experts of a layer lie together. Its three layers of multi-token prediction are left
out."""

from moejax.checkpoint.families.decoder import ATTENTION, LAYER, decoder_names, swiglu_names
from moejax.checkpoint.families.family import NameMap, ServedFamily, TensorNames
from moejax.checkpoint.families.source import ConcatHalves, PlusOne
from moejax.config.model_config import ModelConfig

MOE = LAYER + "moe."


def names(cfg: ModelConfig) -> NameMap:
    """Its name map."""
    plain = decoder_names(cfg)
    norms = ("final_norm", "attention_norm", "ffn_norm", "query_norm", "key_norm")
    return {
        **plain,
        **{name: TensorNames(plain[name].names, PlusOne()) for name in norms},
        "attention_gate": TensorNames((ATTENTION + "g_proj.weight",)),
        "moe.router": TensorNames((MOE + "gate.weight",)),
        "moe.bias": TensorNames((MOE + "router_bias",)),
        "moe.experts.gate_up": TensorNames((MOE + "gate_proj.weight", MOE + "up_proj.weight"), ConcatHalves()),
        "moe.experts.down": TensorNames((MOE + "down_proj.weight",)),
        **swiglu_names("moe.shared", LAYER + "share_expert."),
    }


def unused(cfg: ModelConfig) -> tuple[str, ...]:
    """Tensors of the layers after the last: multi-token prediction."""
    return tuple(f"model.layers.{cfg.n_layers + i}.*" for i in range(3))


STEP3P5 = STEP3P7 = ServedFamily(
    names=names,
    only={
        "use_head_wise_attn_gate": True,
        "use_qk_norm": True,
        "use_moe_router_bias": True,
        "norm_expert_weight": True,
        "moe_router_activation": "sigmoid",
        "use_bidirectional_attention": False,
        "mlp_bias": False,
        "gating": True,
    },
    unused=unused,
    beside=("vision_model.*", "vit_large_projector.*"),
)
