"""Tool calls as the models of each family write them: one file per format, chosen by name or by the chat template."""

from serving.text.tool_formats.deepseek import DeepSeekV3, DeepSeekV31
from serving.text.tool_formats.format import ToolFormat
from serving.text.tool_formats.glm4_moe import Glm4Moe
from serving.text.tool_formats.granite import Granite
from serving.text.tool_formats.harmony import Harmony
from serving.text.tool_formats.hermes import Hermes
from serving.text.tool_formats.kimi_k2 import KimiK2
from serving.text.tool_formats.llama3_json import Llama3Json
from serving.text.tool_formats.llama4_pythonic import Llama4Pythonic
from serving.text.tool_formats.mistral import Mistral
from serving.text.tool_formats.qwen3_coder import Qwen3Coder

_FORMATS: tuple[ToolFormat, ...] = (
    Harmony(),
    DeepSeekV31(),
    DeepSeekV3(),
    KimiK2(),
    Glm4Moe(),
    Qwen3Coder(),
    Mistral(),
    Granite(),
    Hermes(),
    Llama4Pythonic(),
    Llama3Json(),
)
"""All formats; `auto` takes the first whose signs the template has."""

TOOL_FORMATS = {each.name: each for each in _FORMATS}
"""All formats by name."""


def tool_format_of(template: str) -> ToolFormat:
    """The format of the models whose chat template this is: a template writes the calls of earlier turns in it. That of
    Hermes if the template writes none."""
    return next((each for each in _FORMATS if each.is_of(template)), TOOL_FORMATS["hermes"])
