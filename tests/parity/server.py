"""A real server with a process for each rank, asked over gRPC: undisturbed, and with the rank that serves killed."""

import os
import shutil
import signal
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer, models

from moejax.checkpoint.download import cache_folder
from moejax.checkpoint.families import read_config
from serving.api.client import Client
from serving.protocol.sampling import TopLogprobs
from serving.server import Server
from tests.parity.comparison import DECODED, PROMPT, Comparison, draw_prompt, reference_logits
from tests.support.families.published import Case, write_folder
from tests.support.streams import wait_until_whole

BUCKETS = ((2, 0), (2, 2))
LIKELIEST = 20
KILL_AFTER = DECODED // 3


class Said(NamedTuple):
    """The results of one request: after each position but the last of prompt and answer, the log-probability of
    the token that followed, and the likeliest tokens with theirs."""

    tokens: list[int]
    logprobs: list[float]
    top: list[TopLogprobs]
    epochs: set[int]


def compare_served(case: Case, seed: int, ranks: int) -> list[Comparison]:
    """Serve the model and ask it twice: undisturbed, then with SIGKILL to the rank that has the request."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "parity-model"
        reference = write_folder(folder, case, seed)
        cfg = read_config(folder)
        words = {f"w{i}": i for i in range(cfg.vocab_size)}
        Tokenizer(models.WordLevel(words, unk_token="w0")).save(str(folder / "tokenizer.json"))
        prompt = draw_prompt(seed, cfg.vocab_size)
        try:
            with Server(model=str(folder), ranks=ranks, buckets=BUCKETS) as server, Client(server) as client:
                wait_until_whole(client)
                undisturbed = ask(client, prompt, lambda: None)
                wait_until_whole(client)
                killed = ask(client, prompt, lambda: kill_who_serves(client))
        finally:
            for converted in (cache_folder() / "models").glob(f"{folder.name}-*"):
                shutil.rmtree(converted)
    assert len(killed.epochs) > 1, "the rank was killed on the way"
    theirs = reference_logits(reference, prompt + undisturbed.tokens[:-1])
    return [difference(prompt, said, theirs) for said in (undisturbed, killed)]


def ask(client: Client, prompt: list[int], act: Callable[[], object]) -> Said:
    """Stream an answer, and act once a third of its tokens are there."""
    stream = client.stream(
        prompt,
        temperature=0,
        max_tokens=DECODED,
        ignore_eos=True,
        top_logprobs=LIKELIEST,
        prompt_logprobs=LIKELIEST,
    )
    said = Said([], [], [], set())
    for chunk in stream:
        before = len(said.tokens)
        said.tokens.extend(chunk.token_ids)
        said.logprobs.extend(chunk.logprobs)
        said.top.extend(chunk.top)
        said.epochs.add(chunk.epoch)
        if before < KILL_AFTER <= len(said.tokens):
            act()
    scores = sorted(stream.scores, key=lambda each: each.position)
    prompt_logprobs = [value for each in scores for value in each.logprobs]
    prompt_top = [top for each in scores for top in each.top]
    assert len(prompt_logprobs) == PROMPT - 1
    assert len(said.tokens) == DECODED
    return said._replace(logprobs=prompt_logprobs + said.logprobs, top=prompt_top + said.top)


def kill_who_serves(client: Client) -> int:
    """SIGKILL to the rank that has the only request; its number."""
    (busy,) = [rank for rank in client.status().ranks if rank.running]
    assert busy.pid is not None
    os.kill(busy.pid, signal.SIGKILL)
    return busy.id


def difference(prompt: list[int], said: Said, logits_TV: np.ndarray) -> Comparison:
    """The largest difference of the returned log-probabilities from those of the reference."""
    largest = logits_TV.max(-1, keepdims=True)
    normalizer = largest + np.log(np.exp(logits_TV - largest).sum(-1, keepdims=True))
    expected_TV, scale = logits_TV - normalizer, np.abs(logits_TV).max()
    followed = [*prompt[1:], *said.tokens]
    found = []
    for row, token, logprob, top in zip(expected_TV, followed, said.logprobs, said.top, strict=True):
        found.append(max(abs(row[t] - value) for t, value in [(token, logprob), *top]) / scale)
    greedy = logits_TV[PROMPT - 1 :].argmax(-1)
    return Comparison.of(np.array(found), greedy, said.tokens)
