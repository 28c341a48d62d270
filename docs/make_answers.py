"""Writes the page of sample answers: `python -m docs.make_answers > docs/answers.md`.

The dense SmolLM2, the model split into experts and not distilled, and the default model answer the same questions, each
through a server of its own, with the sampling parameters of the model's card and a fixed seed.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from moejax.tools.default_model import PRESET, ensure_smollm2, load_split
from moejax.tools.moefy import Split
from moejax.tools.resolve import ensure_model
from serving.api.client import Client
from serving.server import Server

QUESTIONS = (
    "What is the capital of France, and what is it known for?",
    "Why is the sky blue?",
    "How do I make a cup of tea?",
    "What is a prime number? Give three examples.",
    "Write a haiku about the sea.",
    "My friend is sad because her cat ran away. What could I say to her?",
    "Write a Python function that returns the larger of two numbers.",
    "Tell me a story about a fox and a well.",
)
MAX_TOKENS, SEED = 120, 1
HEAD = """\
# Sample answers

What the default model answers, beside the dense model it is made of and the model before its routers were distilled:
eight questions that are not in the text it was distilled on, with the sampling parameters of its card (temperature 0.2,
top-p 0.9), seed {seed}, and at most {tokens} tokens. `python -m docs.make_answers` makes this page;
[perplexities](results/README.md) say the same in figures. All three are a model of 135 million parameters: they are
fluent, and often wrong.
"""


def models() -> list[tuple[str, Path, str]]:
    """Label, folder and data type of each model."""
    split = load_split(PRESET)
    dense = Split(**{**vars(split), "experts_per_token": split.experts})
    return [
        ("dense, float32", ensure_smollm2(dense), "float32"),
        ("before: split, six of eight experts, float32", ensure_smollm2(split), "float32"),
        ("after: `smollm2-moe` as it is served by default", ensure_model("smollm2-moe"), "auto"),
    ]


def answers(folder: Path, data_type: str) -> list[str]:
    """The answers of one model."""
    with Server(model=str(folder), ranks=1, data_type=data_type) as server, Client(server) as client:
        asked = ([{"role": "user", "content": question}] for question in QUESTIONS)
        return [client.chat(each, max_tokens=MAX_TOKENS, seed=SEED).text.strip() for each in asked]


def page(labels: Sequence[str], given: Sequence[Sequence[str]]) -> str:
    """The page in Markdown: a section for each question, the answers of the models one below the other."""
    parts = [HEAD.format(seed=SEED, tokens=MAX_TOKENS)]
    for i, question in enumerate(QUESTIONS):
        parts.append(f"\n## `{question}`\n")
        for label, texts in zip(labels, given, strict=True):
            quoted = texts[i].replace("```", "~~~")  # a fence in an answer would end the block around it
            parts.append(f"\n*{label}*\n\n```text\n{quoted}\n```\n")
    return "".join(parts)


def main() -> int:
    """Ask every model and print the page."""
    made = models()
    given = []
    for label, folder, data_type in made:
        print(f"asking {label}", file=sys.stderr, flush=True)
        given.append(answers(folder, data_type))
    print(page([label for label, _, _ in made], given), end="")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
