"""The canary of an edge: a text whose tokens and whose answer are known, before clients can connect to the edge."""

import asyncio
import contextlib
import json
import uuid
from collections.abc import AsyncGenerator
from typing import cast

from serving.core.answers import AnswerText
from serving.core.request_processor import RequestProcessor
from serving.errors import NoCapacity, QueueFull, StartError
from serving.launch.run_folder import RunFolder
from serving.launch.upgrade_record import UpgradeRecord
from serving.protocol.request import Request, Scored, Token
from serving.protocol.sampling import ResolvedSampling

PROMPT = "The capital of France is Paris, and the capital of Italy is"
TOKENS = 8
RETRY_S = 0.5
"""Seconds until the canary is sent again that a busy server has refused."""


async def answer_text(processor: RequestProcessor) -> list[object]:
    """The tokens of the prompt, and the text that the model goes on with, as values of JSON."""
    prompt = await processor.encode(PROMPT)
    sampling = ResolvedSampling(temperature=0.0, max_tokens=TOKENS, seed=1)
    while True:
        request = Request(id=f"canary-{uuid.uuid4().hex}", prompt=prompt, sampling=sampling)
        answer, text = AnswerText(processor.tokenizer, request, ()), ""
        try:
            items = cast(AsyncGenerator[Scored | Token | object], processor.backend.stream(request))
            async with contextlib.aclosing(items):
                async for item in items:
                    text += answer.push(item).text if isinstance(item, Token) else ""
            return [list(prompt), text]
        except (QueueFull, NoCapacity):
            await asyncio.sleep(RETRY_S)


async def check_text(processor: RequestProcessor, run: RunFolder) -> None:
    """While an upgrade replaces edges, compare this edge's answer with the one from before. Raises StartError when they
    differ."""
    record = UpgradeRecord.load(run.path)
    if record is None or record.state != "running":
        return
    had, has = json.loads(run.canary.read_text())["text"], await answer_text(processor)
    if had != has:
        raise StartError(f"this edge answers its canary with {has}, and the answer before the upgrade was {had}.")
