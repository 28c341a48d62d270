"""Writes the text that the default model is distilled on: configs/distillation.

    python -m benchmarks.distillation_text [--only generated|excerpts]

`generated.txt` are answers of SmolLM2-135M-Instruct itself, the dense model (all experts chosen), to prompts on forty
subjects: conversations, stories, tips, letters, articles. The others are excerpts of what `tiny` was trained on:
Shakespeare, glosses of WordNet, the Python manual. No excerpt is from a document that was held out
(`moejax.tools.corpus`), on which perplexity is measured.
"""

import argparse
import concurrent.futures
import itertools
import shutil
from pathlib import Path

from moejax.tools.corpus import load_domains
from moejax.tools.default_model import ensure_smollm2
from moejax.tools.moefy import Split
from moejax.tools.smollm2 import DISTILLATION, SEPARATOR
from planner.inputs.shipped import shipped
from serving.api.client import Client
from serving.server import Server

_SUBJECTS = (
    "the history of bread, a lighthouse keeper, photosynthesis, learning to swim, the French Revolution, "
    "a lost dog, how a bicycle works, moving to a new city, black holes, a birthday party, "
    "the stock market, a haunted mill, vaccines, a chess tournament, the Amazon river, "
    "writing a computer program, a job interview, volcanoes, an old photograph, healthy sleep, "
    "the first day of school, electric cars, a village in the mountains, the water cycle, "
    "a quarrel between friends, planting tomatoes, the printing press, a train journey, "
    "how banks lend money, a winter storm, the human heart, a football match, renewable energy, "
    "a letter from a grandmother, dinosaurs, cooking rice, the Moon landing, a mystery at the museum, "
    "sorting numbers in Python, honey bees"
)
QUESTIONS = (
    "Explain {} in simple words.",
    "Write a short story about {}.",
    "Give me five tips or facts about {}.",
    "Write a polite e-mail about {}.",
)
BEGINNINGS = ("An article about {}.\n\n", '"I never thought much about {}," she said.')
CHAT = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
ANSWER_TOKENS = 240
EXCERPTS = 45
"""Excerpts of each domain."""
EXCERPT_CHARACTERS = 1000
STREAMS = 32


def prompts() -> list[str]:
    """Three prompts on each subject: two turns of a user, and the beginning of a text."""
    made = []
    for i, subject in enumerate(_SUBJECTS.split(", ")):
        made += [CHAT.format(QUESTIONS[(i + 2 * k) % 4].format(subject)) for k in (0, 1)]
        made.append(BEGINNINGS[i % 2].format(subject))
    return made


def generated() -> list[str]:
    """Each prompt with the answer of the dense model after it."""
    dense = Split(every=3, experts=8, experts_per_token=8, shared=512, ridge=0.3)
    with (
        Server(model=str(ensure_smollm2(dense)), ranks=1, data_type="bfloat16") as server,
        Client(server) as client,
        concurrent.futures.ThreadPoolExecutor(STREAMS) as pool,
    ):

        def answer(seed: int, prompt: str) -> str:
            sampling = {"max_tokens": ANSWER_TOKENS, "temperature": 0.8, "top_p": 0.95, "seed": seed}
            return prompt + client.generate(prompt, **sampling).text

        return list(pool.map(answer, itertools.count(), prompts()))


def excerpts(documents: tuple[str, ...]) -> list[str]:
    """Parts of documents spread over a domain, each from the first line after a third of its document."""
    step = len(documents) // EXCERPTS
    found = []
    for document in documents[: step * EXCERPTS : step]:
        at = document.find("\n", len(document) // 3) + 1
        found.append(document[at : at + EXCERPT_CHARACTERS])
    return found


def write(folder: Path, name: str, texts: list[str]) -> None:
    """Write a file of texts, which must not hold the separator."""
    if any(SEPARATOR in text for text in texts):
        raise SystemExit(f"a text of {name} holds the separator {SEPARATOR!r}")
    (folder / f"{name}.txt").write_text(SEPARATOR.join(texts), "utf-8")
    print(f"{name}: {len(texts)} texts, {sum(map(len, texts)):,} characters", flush=True)


def main() -> int:
    """Write all files."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", choices=("generated", "excerpts"), help="write these files alone")
    only = parser.parse_args().only
    DISTILLATION.mkdir(exist_ok=True)
    if only != "generated":
        for domain in load_domains(pinned=False):
            write(DISTILLATION, domain.name, excerpts(domain.training))
        shutil.copyfile(shipped("models/tiny/held_out/NOTICES.txt"), DISTILLATION / "NOTICES")
    if only != "excerpts":
        write(DISTILLATION, "generated", generated())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
