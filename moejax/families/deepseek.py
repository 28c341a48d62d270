"""DeepSeek-V2 (arXiv 2405.04434), DeepSeek-V3 and R1 (arXiv 2412.19437), and Kimi-K2, which is V3 in other sizes.

Their rotated dimensions lie in pairs; ours lie in halves. Queries and keys are both reordered, so that scores are the
same. The layer for multi-token prediction that V3's checkpoints carry is left out.
"""

from collections.abc import Callable
from typing import Any

from moejax.config import LatentConfig, ModelConfig, MoEConfig
from moejax.families.decoder import ATTENTION, MLP, decoder_names, expert_names, read_decoder, read_experts
from moejax.families.family import Family, NameMap, Names
from moejax.families.fields import Fields
from moejax.families.latent import KeyUp, PairsToHalves, ValueUp
from moejax.families.rotary import yarn_magnitude


def _read(f: Fields, moe: MoEConfig, q_rank: int) -> dict[str, Any]:
    f.only(attention_bias=False, mlp_bias=False, moe_layer_freq=1, rope_interleave=True)
    latent = LatentConfig(
        d_latent=f.integer("kv_lora_rank", 512),
        d_rope=f.integer("qk_rope_head_dim", 64),
        d_plain=f.integer("qk_nope_head_dim", 128),
        d_value=f.integer("v_head_dim", 128),
        d_query=f.integer("q_lora_rank", 0) if "q_lora_rank" in f.values else q_rank,
    )
    d_head = latent.d_plain + latent.d_rope
    plain = read_decoder(f, d_head=d_head, rotated=latent.d_rope)
    plain["n_kv_heads"] = plain["n_heads"]
    return plain | {"latent": latent, "moe": moe, "attention_scale": d_head**-0.5 * _stretch(f)}


def _stretch(f: Fields) -> float:
    """YaRN's factor on scores, which DeepSeek applies to the softmax and not to the rotated vectors."""
    scaling = f.nested("rope_parameters") or f.nested("rope_scaling")
    if scaling is None or (scaling.values.get("rope_type") or scaling.values.get("type") or "default") == "default":
        return 1.0
    all_dims = scaling.number("mscale_all_dim", 0.0)
    return yarn_magnitude(scaling.number("factor"), all_dims) ** 2 if all_dims else 1.0


def read_v2(f: Fields) -> dict[str, Any]:
    """Gates are shares of a softmax; a group counts by its best expert."""
    f.only(scoring_func="softmax", norm_topk_prob=False)
    method = f.values.get("topk_method") or "greedy"
    if method not in ("greedy", "group_limited_greedy"):
        raise f.error(f"topk_method is {method!r}; known are 'greedy' and 'group_limited_greedy'")
    grouped = method == "group_limited_greedy"
    moe = MoEConfig(
        **read_experts(f),
        d_expert=f.integer("moe_intermediate_size"),
        d_shared=f.integer("n_shared_experts", 2, least=0) * f.integer("moe_intermediate_size"),
        gate="share",
        gate_scale=f.number("routed_scaling_factor", 1.0),
        groups=f.integer("n_group", 1) if grouped else 1,
        groups_used=f.integer("topk_group", 1) if grouped else 1,
    )
    return _read(f, moe, q_rank=1536) | _first_dense(f, 0)


def _reader_v3(*, groups: int, used: int, scale: float, dense: int) -> Callable[[Fields], dict[str, Any]]:
    def read(f: Fields) -> dict[str, Any]:
        f.only(scoring_func="sigmoid", topk_method="noaux_tc")
        moe = sigmoid_moe(f, groups=groups, used=used, scale=scale)
        return _read(f, moe, q_rank=1536) | _first_dense(f, dense)

    return read


def sigmoid_moe(f: Fields, *, groups: int, used: int, scale: float) -> MoEConfig:
    """Routing by sigmoid plus bias, with a family's defaults: V3's (section 2.1.2), also GLM-4's."""
    d_expert = f.integer("moe_intermediate_size")
    return MoEConfig(
        **read_experts(f),
        d_expert=d_expert,
        d_shared=f.integer("n_shared_experts", 1, least=0) * d_expert,
        gate="sigmoid",
        normalised=f.flag("norm_topk_prob", True),
        gate_scale=f.number("routed_scaling_factor", scale),
        groups=f.integer("n_group", groups),
        groups_used=f.integer("topk_group", used),
    )


def _first_dense(f: Fields, default: int) -> dict[str, Any]:
    return {"dense_layers": tuple(range(f.integer("first_k_dense_replace", default, least=0)))}


def names(cfg: ModelConfig) -> NameMap:
    """Their name map."""
    return decoder_names(cfg) | _latent_names(cfg) | shared_expert_names(cfg)


def shared_expert_names(cfg: ModelConfig) -> dict[str, Names]:
    """Names of a routed layer: V2's and V3's, also GLM-4's."""
    routed = expert_names(MLP + "gate.weight", MLP + "experts.", shared=MLP + "shared_experts.")
    if cfg.moe is not None and cfg.moe.gate == "sigmoid":
        routed["moe.bias"] = Names((MLP + "gate.e_score_correction_bias",))
    return routed


def _latent_names(cfg: ModelConfig) -> dict[str, Names]:
    latent = cfg.latent
    assert latent is not None
    sizes = (cfg.n_heads, latent.d_plain, latent.d_value)
    key_value = (ATTENTION + "kv_b_proj.weight",)
    return {
        "latent.query": Names(
            (ATTENTION + ("q_b_proj.weight" if latent.d_query else "q_proj.weight"),),
            PairsToHalves(cfg.n_heads, latent.d_rope),
        ),
        "latent.query_down": Names((ATTENTION + "q_a_proj.weight",)),
        "latent.query_norm": Names((ATTENTION + "q_a_layernorm.weight",)),
        "latent.down": Names((ATTENTION + "kv_a_proj_with_mqa.weight",), PairsToHalves(1, latent.d_rope)),
        "latent.norm": Names((ATTENTION + "kv_a_layernorm.weight",)),
        "latent.key_up": Names(key_value, KeyUp(*sizes)),
        "latent.value_up": Names(key_value, ValueUp(*sizes)),
    }


def next_token_layers(cfg: ModelConfig) -> tuple[str, ...]:
    """Tensors of the layers after the last: multi-token prediction."""
    return ("*.rotary_emb.inv_freq", f"model.layers.{cfg.n_layers}.*")


_V3 = "DeepseekV3ForCausalLM"
DEEPSEEK_V2 = Family(model_type="deepseek_v2", architectures=("DeepseekV2ForCausalLM",), read=read_v2, names=names)
DEEPSEEK_V3 = Family(
    model_type="deepseek_v3",
    architectures=(_V3,),
    read=_reader_v3(groups=8, used=4, scale=2.5, dense=3),
    names=names,
    unused=next_token_layers,
)
KIMI_K2 = Family(
    model_type="kimi_k2",
    architectures=(_V3, "KimiK2ForCausalLM"),
    read=_reader_v3(groups=1, used=1, scale=2.827, dense=1),
    names=names,
    unused=next_token_layers,
)
