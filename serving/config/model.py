"""Settings of the model and of the form that ranks hold it in."""

import dataclasses
from typing import ClassVar

from serving.config.field import SettingsGroup, setting
from serving.errors import InvalidRequest

DATA_TYPES = ("float32", "bfloat16", "int8", "int4")
DENSE = ("replicated", "sharded")
GENERATION_CONFIG = ("model", "off")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelSettings(SettingsGroup):
    """Which model is served, and in which form ranks hold its weights."""

    title: ClassVar[str] = "Model"

    model: str = setting(
        "smollm2-moe", "Name of a known model (`moejax models` lists them), path of a model folder, or of a GGUF file."
    )
    data_type: str = setting(
        "auto",
        "Data type of the weight matrices in the ranks; int8 stores one scale for each output channel, int4 one "
        "for each group of 32 inputs, published is the narrowest type that represents the published weights (the "
        "server says which, and what that costs), auto is the type that the model's own configuration names (int8 for "
        "smollm2-moe), or float32.",
        choices=(*DATA_TYPES, "published", "auto"),
    )
    dense: str = setting(
        "replicated",
        "Whether every rank holds the dense layers whole (replicated), or ranks hold shards of them as they hold "
        "experts (sharded).",
        choices=DENSE,
    )
    in_place: bool = setting(
        False, "Read the weights of a published model from its own files instead of converting them once."
    )
    generation_config: str = setting(
        "model",
        "Where sampling parameters come from that a request leaves out: from the model's generation_config.json "
        "(model), or none of them are set (off).",
        choices=GENERATION_CONFIG,
    )
    chat_template: str | None = setting(
        None, "File of a Jinja template for conversations. Default: the one in the model folder."
    )
    tool_call_parser: str = setting(
        "auto",
        "Format in which the model writes tool calls: deepseek_v3, deepseek_v31, glm4_moe, granite, harmony, hermes, "
        "kimi_k2, llama3_json, llama4_pythonic, mistral, qwen3_coder; that of the chat template (auto), or none (off).",
    )
    reasoning_parser: str = setting(
        "auto",
        "Marks between which the model reasons: think, mistral, those of the chat template (auto), or none (off).",
    )
    max_context: int | None = setting(
        None, "Most tokens of one prompt and its answer together. Default: the model's own limit."
    )

    def check(self) -> None:
        """Check fields of this group against each other. Raises InvalidRequest."""
        if self.in_place and self.dense == "sharded":
            raise InvalidRequest(
                "dense is 'sharded' with in_place: shards are written to a folder of their own. Leave one of them out.",
                param="dense",
            )
