# /// script
# dependencies = ["lm-eval[api]==0.4.13", "transformers==5.20.0"]
# [tool.clients]
# name = "lm-eval"
# ///
"""EleutherAI's evaluation harness, local-completions and local-chat-completions, on small tasks of its own form: its
scores are compared with log-probabilities that the server gives to a plain request."""

import json
import tempfile
from pathlib import Path

import numpy as np

from clients import trials
from clients.trials import call, command, trial

FOLDER = Path(tempfile.mkdtemp())
TEXTS = ["The king is dead, and the night was long.", "What say you, my lord? I know not what to say."]
ENDS = [" the night", " a tree"]
HEAD = """\
task: {task}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {path}}}}}
test_split: test
"""
TASKS = {
    "choice": "output_type: multiple_choice\ndoc_to_text: '{{text}}'\ndoc_to_choice: '{{ends}}'\ndoc_to_target: 0\n"
    "target_delimiter: ''\n"
    "metric_list: [{metric: acc}]\n",
    "rolling": "output_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: '{{text}}'\n"
    "metric_list: [{metric: bits_per_byte}]\n",
    "until": "output_type: generate_until\ndoc_to_text: '{{text}}'\ndoc_to_target: '{{right}}'\n"
    "generation_kwargs: {until: ['.'], max_gen_toks: 12, temperature: 0}\nmetric_list: [{metric: exact_match}]\n",
}


def continued(text: str) -> str:
    body = {"model": trials.model(), "prompt": text, "max_tokens": 12, "temperature": 0, "stop": ["."]}
    return call("/v1/completions", body)["choices"][0]["text"]


def score(text: str, context: str = "") -> float:
    """The log-probability of a text after a context, or of all of it but the first token."""
    echoed = {"model": trials.model(), "prompt": context + text, "max_tokens": 0, "echo": True, "logprobs": 0}
    found = call("/v1/completions", echoed)["choices"][0]["logprobs"]
    tokens = zip(found["token_logprobs"], found["text_offset"], strict=True)
    return sum(value for value, at in tokens if value is not None and at >= len(context))


def evaluate(task: str, model: str = "local-completions", path: str = "completions", **more: str) -> dict:
    """The results and samples of a task."""
    right = [{"text": text, "ends": ENDS, "right": continued(text)} for text in TEXTS]
    (FOLDER / "docs.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in right))
    head = HEAD.format(task=task, path=FOLDER / "docs.jsonl")
    (FOLDER / f"{task}.yaml").write_text(head + TASKS[task])
    arguments = {"model": trials.model(), "base_url": f"{trials.base()}/v1/{path}", "max_length": "512"}
    words = ",".join(f"{name}={value}" for name, value in {**arguments, **more}.items())
    out = Path(tempfile.mkdtemp(dir=FOLDER))
    options = ("--include_path", str(FOLDER), "--output_path", str(out), "--log_samples")
    chat = ("--apply_chat_template",) if "chat" in path else ()
    command("lm_eval", "run", "--model", model, "--model_args", words, "--tasks", task, *options, *chat)
    (results,) = out.rglob("results_*.json")
    (samples,) = out.rglob("samples_*.jsonl")
    lines = [json.loads(line) for line in samples.read_text().splitlines()]
    scores = json.loads(results.read_text())["results"][task]
    return {"results": scores, "samples": sorted(lines, key=lambda sample: sample["doc_id"])}


def check_choices(samples: list[dict]) -> None:
    for text, sample in zip(TEXTS, samples, strict=True):
        for end, answer in zip(ENDS, sample["filtered_resps"], strict=True):
            found, right = float(answer[0]), score(end, text)
            assert abs(found - right) < 1e-3, (found, right)


@trial("multiple choice, tokenizer of the model's folder")
def choice() -> None:
    check_choices(evaluate("choice", tokenizer=trials.model_folder())["samples"])


@trial("multiple choice, tokenizer of the server (/tokenizer_info)")
def choice_remote() -> None:
    check_choices(evaluate("choice", tokenizer_backend="remote")["samples"])


@trial("rolling log-likelihood: bits per byte")
def rolling() -> str:
    found = evaluate("rolling", tokenizer=trials.model_folder())
    bits = next(value for name, value in found["results"].items() if name.startswith("bits_per_byte,"))
    assert 0.5 < bits < 8, bits
    for text, sample in zip(TEXTS, found["samples"], strict=True):
        total = float(np.ravel(sample["filtered_resps"])[0])
        assert total < score(text) < 0, (total, score(text))  # the harness counts the first token too
    return f"{bits:.2f} bits per byte"


@trial("generate_until")
def until() -> None:
    samples = evaluate("until", tokenizer=trials.model_folder())["samples"]
    for text, sample in zip(TEXTS, samples, strict=True):
        trials.same(sample["resps"][0][0].strip(), continued(text).strip())


@trial("generate_until, chat completions")
def chat() -> None:
    samples = evaluate("until", "local-chat-completions", "chat/completions")["samples"]
    assert all(isinstance(sample["resps"][0][0], str) for sample in samples), samples


if __name__ == "__main__":
    trials.main()
