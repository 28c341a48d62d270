"""A response with JSON, and the header that names the fields of the request that were ignored."""

import logging
import re
from collections.abc import Collection, Mapping
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

log = logging.getLogger(__name__)

IGNORED_FIELDS = "X-Moejax-Ignored-Fields"
_MOST_NAMES, _LONGEST_NAME = 20, 100
_LOGGED = 1000
"""Most fields of which each is logged once."""
_seen: set[str] = set()


def json_response(value: Any, headers: Mapping[str, str] | None = None) -> Response:
    """A response with an object of `serving.api.http.openai_objects`, or any other value that JSON can express."""
    return Response(msgspec.json.encode(value), 200, headers, "application/json")


def ignored_fields_header(request: Request, ignored: Collection[str]) -> dict[str, str]:
    """The header that names these fields, empty without any. A line in the log names each when it first comes."""
    if not ignored:
        return {}
    # What a caller wrote must not end the header or begin another.
    names = [re.sub(r"[^\x21-\x2b\x2d-\x7e]", "?", name)[:_LONGEST_NAME] or '""' for name in ignored][:_MOST_NAMES]
    new = [name for name in names if name not in _seen]
    if new and len(_seen) < _LOGGED:
        _seen.update(new)
        log.warning("%s: ignored fields %s (docs/openai.md; each is logged once)", request.url.path, ", ".join(new))
    return {IGNORED_FIELDS: ", ".join(names)}
