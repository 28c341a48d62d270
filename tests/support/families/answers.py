"""The answers of `transformers` for small published folders, recorded for tests without torch.

.venv/bin/python -m tests.support.families.answers      records them again (needs the extra `parity`)

"""

import dataclasses
import json
import sys
import tempfile
from pathlib import Path

import numpy as np

from planner.inputs.published.mistral_format import FAMILY
from tests.support.families.case import Case
from tests.support.families.published import ALL, decoder_of, reference_class
from tests.support.families.small import VOCABULARY, small_folder, transformers_folder

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
    """The answer of one of ALL."""
    return Answer(**json.loads(RECORDED.read_text())[name])


def answer(folder: Path, case: Case, seed: int = 0) -> Answer:
    """Ask transformers, which reads the folder by itself."""
    import torch

    torch.set_num_threads(1)  # of so small a model more would wait for each other
    model = reference_class(case).from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    model = decoder_of(model)
    prompt = np.random.default_rng(seed).integers(3, VOCABULARY, PROMPT).tolist()
    tokens, margins, new, cached = [], [], prompt, None
    for _ in range(ANSWER):
        with torch.no_grad():
            out = model(torch.tensor([new]), past_key_values=cached, use_cache=True)
        logits, cached = out.logits[0, -1].numpy(), out.past_key_values
        second, first = np.sort(logits)[-2:]
        margins.append((first - second) / np.abs(logits).max())
        new = [int(logits.argmax())]
        tokens += new
    return Answer(prompt, tokens, round(float(min(margins)), 6))


def ask(name: str) -> Answer:
    """The answer of one of ALL, now."""
    case = ALL[name]
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "model"
        if case.family == FAMILY:
            transformers_folder(folder, name)  # which transformers does not read in the other form
            return answer(folder, case)
        small_folder(folder, name)
        config = json.loads((folder / "config.json").read_text())
        # Kimi-K2 is DeepSeek-V3 by another name, which transformers does not know.
        (folder / "config.json").write_text(json.dumps(config | {"model_type": case.model_type}))
        return answer(folder, case)


def main() -> None:
    """Record all of them, or those named on the command line."""
    kept = json.loads(RECORDED.read_text()) if RECORDED.is_file() else {}
    for name in sys.argv[1:] or ALL:
        kept[name] = dataclasses.asdict(ask(name))
        print(name, kept[name]["margin"])
    rows = (f"{json.dumps(name)}: {json.dumps(kept[name])}" for name in ALL if name in kept)
    RECORDED.write_text("{\n" + ",\n".join(rows) + "\n}\n")


if __name__ == "__main__":
    main()
