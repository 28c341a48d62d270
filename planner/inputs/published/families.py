"""The table of architectures that are read, and of others that people ask for and that are not read yet."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from planner.inputs.published.afmoe import read_afmoe
from planner.inputs.published.config_fields import ConfigFields
from planner.inputs.published.deepseek import read_deepseek_v2, read_deepseek_v32, reader_of_v3
from planner.inputs.published.dots1 import read_dots1
from planner.inputs.published.ernie4_5_moe import read_ernie4_5_moe
from planner.inputs.published.exaone_moe import read_exaone_moe
from planner.inputs.published.gemma4 import read_gemma4
from planner.inputs.published.glm4_moe import (
    read_glm4_moe,
    read_glm4_moe_lite,
    read_glm4v_moe,
    read_glm_moe_dsa,
    read_solar_open,
)
from planner.inputs.published.gpt_oss import read_gpt_oss
from planner.inputs.published.granite_moe import read_granite_moe, read_granite_moe_shared
from planner.inputs.published.hunyuan import read_hunyuan_v1_moe, read_hy_v3
from planner.inputs.published.kimi_linear import read_bailing_hybrid, read_kimi_linear
from planner.inputs.published.laguna import read_laguna
from planner.inputs.published.lfm2_moe import read_lfm2_moe
from planner.inputs.published.llama import read_llama, read_mistral, read_qwen2, read_qwen3
from planner.inputs.published.llama4 import read_llama4
from planner.inputs.published.mimo_v2 import read_mimo_v2_flash
from planner.inputs.published.minimax_m2 import read_minimax_m2
from planner.inputs.published.mistral import read_ministral3, read_mistral3, read_mistral4
from planner.inputs.published.mistral_format import FAMILY, read_mistral_format
from planner.inputs.published.mixtral import read_mixtral
from planner.inputs.published.nemotron_h import read_nemotron_h
from planner.inputs.published.olmoe import read_olmoe
from planner.inputs.published.phimoe import read_phimoe
from planner.inputs.published.qwen3_next import read_qwen3_5, read_qwen3_5_moe, read_qwen3_next
from planner.inputs.published.qwen_moe import read_qwen2_moe, read_qwen3_moe, read_qwen3_vl_moe
from planner.inputs.published.step3p5 import read_step3p5


@dataclass(frozen=True)
class PublishedFamily:
    """An architecture: the classes that config.json may name beside its `model_type`, its reader, which gives the
    fields of PublishedModel but for `family` and `form`, and what is special `about` it."""

    architectures: tuple[str, ...]
    read: Callable[[ConfigFields], dict[str, Any]]
    about: str


FAMILIES: dict[str, PublishedFamily] = {
    "llama": PublishedFamily(("LlamaForCausalLM",), read_llama, "no experts"),
    "mistral": PublishedFamily(
        ("MistralForCausalLM",), read_mistral, "no experts; sliding window, if the config has one"
    ),
    "qwen2": PublishedFamily(("Qwen2ForCausalLM",), read_qwen2, "no experts; biases on queries, keys and values"),
    "qwen3": PublishedFamily(("Qwen3ForCausalLM",), read_qwen3, "no experts; queries and keys normed by head"),
    "mixtral": PublishedFamily(
        ("MixtralForCausalLM",), read_mixtral, "softmax over the chosen experts; sliding window, if the config has one"
    ),
    "olmoe": PublishedFamily(
        ("OlmoeForCausalLM",),
        read_olmoe,
        "queries and keys normed over all heads and clipped; the gates are a part of the softmax over all experts",
    ),
    "qwen2_moe": PublishedFamily(("Qwen2MoeForCausalLM",), read_qwen2_moe, "gated shared expert and biases"),
    "qwen3_moe": PublishedFamily(("Qwen3MoeForCausalLM",), read_qwen3_moe, "queries and keys normed by head"),
    "deepseek_v2": PublishedFamily(
        ("DeepseekV2ForCausalLM",),
        read_deepseek_v2,
        "latent attention (the cache holds latents), shared experts, dense first layers, expert groups, YaRN",
    ),
    "deepseek_v3": PublishedFamily(
        ("DeepseekV3ForCausalLM",),
        reader_of_v3(groups=8, used=4, scale=2.5, dense=3),
        "the same with sigmoid routing and a bias",
    ),
    "kimi_k2": PublishedFamily(
        ("DeepseekV3ForCausalLM", "KimiK2ForCausalLM"),
        reader_of_v3(groups=1, used=1, scale=2.827, dense=1),
        "DeepSeek-V3 in other sizes",
    ),
    "glm4_moe": PublishedFamily(
        ("Glm4MoeForCausalLM",),
        read_glm4_moe,
        "DeepSeek-V3's routing over grouped-query attention; half of each head is rotated",
    ),
    "gpt_oss": PublishedFamily(
        ("GptOssForCausalLM",),
        read_gpt_oss,
        "attention sinks, a sliding window on every other layer, biases everywhere, clamped SwiGLU",
    ),
    "llama4": PublishedFamily(
        ("Llama4ForConditionalGeneration",),
        read_llama4,
        "the decoder of text: chunks, layers without rotary embedding whose scores grow, one expert of scaled input",
    ),
    "llama4_text": PublishedFamily(
        ("Llama4ForCausalLM", "Llama4ForConditionalGeneration"), read_llama4, "the same, published by itself"
    ),
    "granitemoe": PublishedFamily(
        ("GraniteMoeForCausalLM",), read_granite_moe, "scales on embeddings, residuals, attention scores and logits"
    ),
    "granitemoeshared": PublishedFamily(
        ("GraniteMoeSharedForCausalLM",), read_granite_moe_shared, "Granite-MoE with a shared expert"
    ),
    "phimoe": PublishedFamily(
        ("PhiMoEForCausalLM", "PhimoeForCausalLM"),
        read_phimoe,
        "SparseMixer routing, layer norm, LongRoPE (served up to the original context, unless asked for more)",
    ),
    "glm4_moe_lite": PublishedFamily(
        ("Glm4MoeLiteForCausalLM",), read_glm4_moe_lite, "GLM-4.7-Flash: DeepSeek-V3's latent attention and routing"
    ),
    "dots1": PublishedFamily(
        ("Dots1ForCausalLM",), read_dots1, "dots.llm1: DeepSeek-V3's routing, queries and keys normed by head"
    ),
    "solar_open": PublishedFamily(
        ("SolarOpenForCausalLM",), read_solar_open, "Solar Open: DeepSeek-V3's routing over grouped-query attention"
    ),
    "minimax_m2": PublishedFamily(
        ("MiniMaxM2ForCausalLM",),
        read_minimax_m2,
        "M2, M2.1, M2.5, M2.7: sigmoid routing with bias, queries and keys normed over all heads, half rotated",
    ),
    "hy_v3": PublishedFamily(
        ("HYV3ForCausalLM",), read_hy_v3, "Hy3: DeepSeek-V3's routing, queries and keys normed by head"
    ),
    "hunyuan_v1_moe": PublishedFamily(
        ("HunYuanMoEV1ForCausalLM",),
        read_hunyuan_v1_moe,
        "Hunyuan-A13B: queries and keys normed after they are rotated, NTK-alpha scaling",
    ),
    "ernie4_5_moe": PublishedFamily(
        ("Ernie4_5_MoeForCausalLM", "Ernie4_5_MoEForCausalLM"),
        read_ernie4_5_moe,
        "ERNIE 4.5: experts chosen by softmax plus bias",
    ),
    "afmoe": PublishedFamily(
        ("AfmoeForCausalLM",), read_afmoe, "Trinity: windows, gated attention, norms before and after each part"
    ),
    "exaone_moe": PublishedFamily(
        ("ExaoneMoeForCausalLM", "ExaoneMoEForCausalLM"),
        read_exaone_moe,
        "K-EXAONE: windows, no rotary embedding on the other layers",
    ),
    "mimo_v2_flash": PublishedFamily(
        ("MiMoV2FlashForCausalLM",),
        read_mimo_v2_flash,
        "windows with sinks and key/value heads of their own, values smaller than keys, DeepSeek-V3's routing",
    ),
    "laguna": PublishedFamily(
        ("LagunaForCausalLM",),
        read_laguna,
        "windows with heads and a rotary embedding of their own, attention gated by softplus, capped router",
    ),
    "step3p5": PublishedFamily(
        ("Step3p5ForCausalLM",),
        read_step3p5,
        "Step-3.5-Flash: windows with heads and a rotary embedding of their own, attention gated by head, bounded "
        "activations",
    ),
    "step3p7": PublishedFamily(
        ("Step3p7ForConditionalGeneration",),
        read_step3p5,
        "the decoder of text of Step-3.7-Flash, which is Step-3.5's",
    ),
    "kimi_k25": PublishedFamily(
        ("KimiK25ForConditionalGeneration", "Kimi_K25ForConditionalGeneration"),
        reader_of_v3(groups=8, used=4, scale=2.5, dense=3),
        "the decoder of text of K2.5, K2.6 and K2.7, which is DeepSeek-V3's",
    ),
    "qwen3_vl_moe": PublishedFamily(
        ("Qwen3VLMoeForConditionalGeneration",), read_qwen3_vl_moe, "the decoder of text of Qwen3-VL"
    ),
    "qwen3_next": PublishedFamily(
        ("Qwen3NextForCausalLM",),
        read_qwen3_next,
        "gated delta nets on three of four layers, whose context is a state; gated attention on the fourth",
    ),
    "qwen3_5_moe": PublishedFamily(
        ("Qwen3_5MoeForConditionalGeneration",),
        read_qwen3_5_moe,
        "Qwen3.5, 3.6, 3.8: the decoder of text, which is Qwen3-Next's",
    ),
    "qwen3_5": PublishedFamily(
        ("Qwen3_5ForConditionalGeneration",), read_qwen3_5, "the same without experts: Qwen3.5-27B, 9B, 4B"
    ),
    "lfm2_moe": PublishedFamily(
        ("Lfm2MoeForCausalLM",),
        read_lfm2_moe,
        "gated short convolutions on three of four layers, whose context is a state; sigmoid routing with bias",
    ),
    "nemotron_h": PublishedFamily(
        ("NemotronHForCausalLM",),
        read_nemotron_h,
        "Nemotron 3: Mamba-2 on most layers, whose context is a state; experts without a gate, also in a latent",
    ),
    "kimi_linear": PublishedFamily(
        ("KimiLinearForCausalLM",),
        read_kimi_linear,
        "Kimi delta attention on three of four layers, whose context is a state; latent attention without rotation",
    ),
    "bailing_hybrid": PublishedFamily(
        ("BailingMoeV3ForCausalLM", "BailingHybridForCausalLM"),
        read_bailing_hybrid,
        "Ling 3: Kimi delta attention on five of six layers; latent attention gated by head",
    ),
    "deepseek_v32": PublishedFamily(
        ("DeepseekV32ForCausalLM",),
        read_deepseek_v32,
        "DeepSeek-V3 whose attention sees the positions that an indexer chooses; its keys are cached too",
    ),
    "glm_moe_dsa": PublishedFamily(
        ("GlmMoeDsaForCausalLM",), read_glm_moe_dsa, "GLM-5, 5.1: DeepSeek-V3.2's attention and routing"
    ),
    "ministral3": PublishedFamily(
        ("Ministral3ForCausalLM",), read_ministral3, "no experts; queries grow with position"
    ),
    "mistral4": PublishedFamily(
        ("Mistral4ForCausalLM",),
        read_mistral4,
        "DeepSeek-V3's latent attention with queries that grow, experts by softmax in groups",
    ),
    "mistral3": PublishedFamily(
        ("Mistral3ForConditionalGeneration",),
        read_mistral3,
        "the decoder of text of Mistral Small 3 and 4 and of Ministral 3",
    ),
    FAMILY: PublishedFamily(
        ("MistralLarge3ForCausalLM",),
        read_mistral_format,
        "Mistral's own format, params.json and consolidated.safetensors: Large 3 and Small 4, dense models, Mixtral",
    ),
    "glm4v_moe": PublishedFamily(
        ("Glm4vMoeForConditionalGeneration",), read_glm4v_moe, "the decoder of text of GLM-4.5V and 4.6V"
    ),
    "gemma4": PublishedFamily(
        ("Gemma4ForConditionalGeneration",),
        read_gemma4,
        "Gemma 4 26B-A4B and 31B, the decoder of text: windows with heads of their own, a dense part beside experts",
    ),
    "gemma4_text": PublishedFamily(("Gemma4ForCausalLM",), read_gemma4, "the same, published by itself"),
}
"""Architectures by `model_type`: that of the whole model, or of its `text_config`."""

NOT_READ = {
    "deepseek_v4": "compressed sparse attention, hyper-connections and hash routing",
    "granitemoehybrid": "Mamba-2 layers as Granite 4 has them (those of Nemotron are served)",
    "jamba": "Mamba layers, whose context is a state",
    "longcat_flash": "two attention parts in a layer, and experts that compute nothing",
    "minimax_m3": "block-sparse attention",
    "minimax_m3_vl": "block-sparse attention",
}
"""Architectures that people ask for and that neither planner nor server know, and what the decoder lacks."""

CARDS_WITHOUT_EMBEDDING = ("gpt_oss",)
"""Families whose model cards leave the input embedding out of the active parameters (gpt-oss: arXiv 2508.10925)."""
