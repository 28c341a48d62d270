"""Reads the JSON body of a request, and cancels work when its client disconnects."""

import asyncio
import codecs
import json
from collections.abc import Awaitable
from typing import Any, TypeVar

import msgspec
from starlette.requests import Request

from serving.errors import Cancelled, InvalidRequest

T = TypeVar("T")


async def read_json(request: Request) -> Any:
    """The decoded JSON body, which may begin with a byte-order mark. The middleware limits its length. Raises
    InvalidRequest if it is not JSON in UTF-8."""
    data = (await request.body()).removeprefix(codecs.BOM_UTF8)
    try:
        return msgspec.json.decode(data)
    except RecursionError:
        raise InvalidRequest("the body is nested too deeply.") from None
    except (msgspec.DecodeError, UnicodeDecodeError):
        raise InvalidRequest(_decode_error(data)) from None


def _decode_error(data: bytes) -> str:
    """The fault of a body that msgspec does not decode, in the clearer words of the standard library."""
    try:
        json.loads(data.decode(), parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        return f"the body is not valid UTF-8: {error.reason} at byte {error.start}."
    except (ValueError, RecursionError) as error:
        return f"the body is not valid JSON: {error}"
    return (
        "the body is not valid JSON: it has half of a surrogate pair, which is no character, or a number that is out "
        "of range."
    )


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON number")


async def cancel_on_disconnect(request: Request, work: Awaitable[T]) -> T:
    """The result of `work`. When the client disconnects first, `work` is cancelled and Cancelled raised."""
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_wait_for_disconnect(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise Cancelled("the client disconnected.")
        return task.result()
    finally:
        for each in (task, gone):
            each.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _wait_for_disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def required(value: str | None, where: str) -> str:
    """The value of a field. Raises InvalidRequest naming the field when it is missing."""
    if value is None:
        raise InvalidRequest(f"{where} is missing.", param=where)
    return value
