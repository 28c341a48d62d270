"""The tokenizer and the sampling defaults of a prepared model, as the settings want them."""

from pathlib import Path

from serving.config import Settings
from serving.protocol.prepared_model import PreparedModel
from serving.protocol.sampling import SamplingDefaults
from serving.text.generation_config import load_sampling_defaults
from serving.text.tokenizer import Tokenizer


def load_tokenizer(settings: Settings, model: PreparedModel) -> Tokenizer:
    """The tokenizer in the model's folder."""
    return Tokenizer.load(
        Path(model.folder),
        bos_token=model.bos_token,
        stop_tokens=model.stop_tokens,
        chat_template=None if settings.chat_template is None else Path(settings.chat_template),
        tool_call_parser=settings.tool_call_parser,
        reasoning_parser=settings.reasoning_parser,
    )


def load_defaults(settings: Settings, model: PreparedModel) -> SamplingDefaults | None:
    """The model's own sampling defaults; None where the settings leave them out."""
    if settings.generation_config == "off":
        return None
    return load_sampling_defaults(Path(model.folder), model.vocab_size)
