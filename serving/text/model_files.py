"""The tokenizer and the sampling defaults of a prepared model, as the settings want them."""

import hashlib
import itertools
from pathlib import Path

from serving.config import Settings
from serving.protocol.prepared_model import PreparedModel
from serving.protocol.sampling import SamplingDefaults
from serving.text import chat_template, generation_config, tokenizer_formats
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


def text_digest(folder: Path) -> str:
    """A digest, as 16 hexadecimal digits, of the files of a model folder that decide how texts become tokens and tokens
    become texts."""
    digest = hashlib.sha256()
    names = (
        tokenizer_formats.TOKENIZER_CONFIG,
        tokenizer_formats.SPECIAL_TOKENS_MAP,
        generation_config.FILE,
        chat_template.FILE,
        chat_template.PROCESSOR_FILE,
    )
    files = itertools.islice(tokenizer_formats.tokenizer_files(folder), 1)
    further = sorted((folder / chat_template.FURTHER).glob("*.jinja"))
    for path in (*files, *(folder / name for name in names), *further):
        if path.is_file():
            data = path.read_bytes()
            digest.update(f"{path.relative_to(folder)} {len(data)}\n".encode() + data)
    return digest.hexdigest()[:16]
