"""The files of a tokenizer in one ZIP archive, for gateways that make tokens and text themselves."""

import io
import json
import zipfile

from serving.errors import InvalidRequest
from serving.text.chat_template import FILE as CHAT_TEMPLATE
from serving.text.tokenizer import Tokenizer
from serving.text.tokenizer_formats import SPECIAL_TOKENS_MAP, TOKENIZER_CONFIG, tokenizer_files

_FURTHER = (SPECIAL_TOKENS_MAP, "generation_config.json")


def tokenizer_archive(tokenizer: Tokenizer) -> bytes:
    """The archive; the same tokenizer has the same bytes.

    `tokenizer_config.json` and the chat template have the contents that this server uses. Raises
    InvalidRequest for a tokenizer that was read from no folder.
    """
    folder = tokenizer.folder
    if folder is None:
        raise InvalidRequest("this server's tokenizer was read from no files, so there are none to send.")
    path = next(tokenizer_files(folder))
    files = {path.name: path.read_bytes()}
    files |= {name: (folder / name).read_bytes() for name in _FURTHER if (folder / name).is_file()}
    files[TOKENIZER_CONFIG] = json.dumps(tokenizer.info).encode()
    if template := tokenizer.info.get("chat_template"):
        files[CHAT_TEMPLATE] = template.encode()
    output = io.BytesIO()
    with zipfile.ZipFile(output, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(zipfile.ZipInfo(name), content, zipfile.ZIP_DEFLATED)  # without the time of the file
    return output.getvalue()
