"""What `transformers` answers to small published folders, recorded for tests that have no torch.

.venv/bin/python -m tests.moejax.families.answers      records them anew (needs the extra `parity`)

"""

import dataclasses
import json
import tempfile
from pathlib import Path

import numpy as np

from tests.moejax.families.published import CASES
from tests.moejax.families.small import VOCABULARY, small_folder

RECORDED = Path(__file__).with_name("answers.json")
PROMPT, ANSWER = 41, 64


@dataclasses.dataclass(frozen=True)
class Answer:
    """Greedy tokens after a prompt. `margin` is how far the likeliest token was ahead at the closest, over the largest
    logit: another sum order changes a logit by some 1e-6 of that."""

    prompt: list[int]
    tokens: list[int]
    margin: float


def recorded(name: str) -> Answer:
    """The answer of one of CASES."""
    return Answer(**json.loads(RECORDED.read_text())[name])


def answer(folder: Path, seed: int = 0) -> Answer:
    """Ask transformers, which reads the folder by itself."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    prompt = np.random.default_rng(seed).integers(3, VOCABULARY, PROMPT).tolist()
    tokens, margins = list(prompt), []
    for _ in range(ANSWER):
        with torch.no_grad():
            logits = model(torch.tensor([tokens]), use_cache=False).logits[0, -1].numpy()
        second, first = np.sort(logits)[-2:]
        margins.append((first - second) / np.abs(logits).max())
        tokens.append(int(logits.argmax()))
    return Answer(prompt, tokens[PROMPT:], round(float(min(margins)), 5))


def ask(name: str) -> Answer:
    """The answer of one of CASES, now."""
    with tempfile.TemporaryDirectory() as place:
        small_folder(Path(place) / "model", name)
        return answer(Path(place) / "model")


def main() -> None:
    """Record all of them."""
    rows = [f"{json.dumps(name)}: {json.dumps(dataclasses.asdict(ask(name)))}" for name in CASES]
    RECORDED.write_text("{\n" + ",\n".join(rows) + "\n}\n")
    print({name: recorded(name).margin for name in CASES})


if __name__ == "__main__":
    main()
