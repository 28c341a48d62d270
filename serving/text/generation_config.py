"""The sampling parameters that a model's authors recommend: its `generation_config.json`."""

import json
from pathlib import Path
from typing import Any

from serving.errors import InvalidRequest, StartError
from serving.protocol.sampling import SamplingDefaults, SamplingParams
from serving.text.validation import check_sampling

FILE = "generation_config.json"
_FIELDS = {"temperature": float, "top_p": float, "min_p": float, "repetition_penalty": float, "top_k": int}


def load_sampling_defaults(folder: Path, vocab_size: int) -> SamplingDefaults:
    """The defaults in the `generation_config.json` of a model folder; without one, defaults that change nothing. As in
    vLLM `max_new_tokens` is the default of max_tokens, and `do_sample` is not read.

    Raises StartError naming the file and the field.
    """
    path = folder / FILE
    if not path.is_file():
        return SamplingDefaults()
    try:
        values = json.loads(path.read_text("utf-8-sig"))
        if not isinstance(values, dict):
            raise TypeError("it is no JSON object")
        given: dict[str, Any] = {
            name: kind(values[name]) for name, kind in _FIELDS.items() if values.get(name) is not None
        }
        most = values.get("max_new_tokens")
        given["top_k"] = max(0, given.get("top_k", 0))  # -1 switches it off
        params = SamplingParams(**given, max_tokens=None if most is None else int(most))
        check_sampling(params, vocab_size)
    except (ValueError, TypeError, InvalidRequest) as error:
        raise StartError(f"{path} cannot be used: {error} Mend it, or start with --generation-config off.") from error
    return SamplingDefaults(**given, max_tokens=params.max_tokens)
