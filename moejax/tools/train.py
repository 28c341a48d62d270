"""Train a small model on the three-domain text: `moejax train`.

A run is a function of its preset: batches are drawn by (seed, step), so a run that was stopped and resumed
ends with the model of a run that was not. AdamW with a warm-up and a cosine, and the routers' balance loss.
"""

import argparse
import dataclasses
import json
import shutil
import tomllib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Int
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from moejax.checkpoint.checkpoint import read_params, replace_folder, save_model, write_params
from moejax.config.axes import ArrayLike
from moejax.config.config_values import ConfigError, build_config
from moejax.config.model_config import ModelConfig
from moejax.config.params import Params, init_params
from moejax.model.reference import forward, next_token_losses
from moejax.tools.corpus import Domain, load_domains
from moejax.tools.score import bits_per_byte
from planner.inputs.shipped import shipped

PRESETS = shipped("configs/presets")
END_OF_TEXT = "<|endoftext|>"
SAMPLE = 6000
"""Characters of held-out text kept with the model."""
CHAT_TEMPLATE = shipped("configs/templates/plain.jinja")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingPhase:
    """Part of a training run with one shape of batch: `batch` sequences of `sequence` tokens per step."""

    steps: int
    batch: int
    sequence: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """The training of a model. `capacity_factor`: rows an expert computes over an even share of them."""

    learning_rate: float
    warmup: int
    weight_decay: float
    balance: float
    capacity_factor: float
    seed: int
    save_every: int
    phases: tuple[TrainingPhase, ...]

    @property
    def steps(self) -> int:
        """Steps of all phases."""
        return sum(phase.steps for phase in self.phases)

    def phase_at(self, step: int) -> TrainingPhase:
        """The phase that step number `step`, from 0, belongs to."""
        left = step
        for phase in self.phases:
            if left < phase.steps:
                return phase
            left -= phase.steps
        raise ValueError(f"step {step} lies beyond the last of {self.steps}")


def load_preset(path: Path) -> tuple[ModelConfig, TrainingConfig]:
    """Read a preset with a `[model]` and a `[training]` table. Raises ConfigError on what it cannot be."""
    with path.open("rb") as file:
        tables = tomllib.load(file)
    try:
        training = dict(tables["training"])
        training["phases"] = tuple(build_config(TrainingPhase, phase, "phase") for phase in training["phases"])
        model = ModelConfig.from_json(json.dumps(tables["model"]))
    except KeyError as error:
        raise ConfigError(f"{path} lacks the table or key {error}.") from None
    try:
        return model, build_config(TrainingConfig, training, "training")
    except ConfigError as error:
        raise ConfigError(f"{path}, table training: {error}") from None


def train_tokenizer(domains: list[Domain], vocab_size: int) -> Tokenizer:
    """A byte-level BPE of `vocab_size` entries; entry 0 ends a document."""
    tokenizer = Tokenizer(models.BPE())
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    share = min(sum(map(len, d.training)) for d in domains)
    tokenizer.train_from_iterator((t for d in domains for t in _first(d.training, share)), trainer)
    return tokenizer


def _first(documents: tuple[str, ...], characters: int) -> list[str]:
    """The first documents that hold about so many characters."""
    ends = np.cumsum([len(d) for d in documents])
    return list(documents[: int(np.searchsorted(ends, characters)) + 1])


def encode_domain(tokenizer: Tokenizer, domain: Domain) -> np.ndarray:
    """All training documents of a domain as one row of tokens, a document end after each."""
    rows = [[*e.ids, 0] for e in tokenizer.encode_batch(list(domain.training))]
    return np.concatenate([np.asarray(row, np.int32) for row in rows])


def draw_batch(streams: list[np.ndarray], training: TrainingConfig, step: int) -> np.ndarray:
    """The batch of a step `[B, T+1]`: windows at random places, the domains in turn."""
    phase = training.phase_at(step)
    rng = np.random.default_rng([training.seed, step])
    rows = []
    for i in range(phase.batch):
        stream = streams[(step * phase.batch + i) % len(streams)]
        start = rng.integers(len(stream) - phase.sequence)
        rows.append(stream[start : start + phase.sequence + 1])
    return np.stack(rows)


def optimizer(training: TrainingConfig) -> Any:
    """AdamW; the decay spares norms, biases and nothing else.

    An `optax.GradientTransformation`, whose annotations know no dataclass of arrays.
    """
    rate = optax.warmup_cosine_decay_schedule(
        0.0, training.learning_rate, training.warmup, training.steps, end_value=training.learning_rate * 0.02
    )

    def decays(params: Params) -> Any:
        def spared(path: Any) -> bool:
            return any(word in jax.tree_util.keystr(path) for word in ("norm", "bias"))

        return jax.tree_util.tree_map_with_path(lambda path, _: not spared(path), params)

    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(rate, b2=0.98, weight_decay=training.weight_decay, mask=decays),
    )


@partial(jax.jit, static_argnames=("cfg", "training"), donate_argnames=("params", "state"))
def train_step(
    params: Params, state: Any, tokens_BS: Int[ArrayLike, "B S"], cfg: ModelConfig, training: TrainingConfig
) -> tuple[Params, Any, jax.Array]:
    """One step of AdamW on `tokens_BS`; the loss is in nats per token, without the balance part."""

    def loss(params: Params) -> tuple[jax.Array, jax.Array]:
        rows = tokens_BS[:, 1:].size
        capacity = None
        if cfg.moe is not None:
            even = rows * cfg.moe.experts_per_token / cfg.moe.experts
            capacity = min(rows, int(even * training.capacity_factor))
        logits, routing = forward(params, cfg, tokens_BS[:, :-1], capacity=capacity)
        nats = next_token_losses(logits, tokens_BS[:, 1:]).mean()
        return nats + training.balance * routing.balance.sum(), nats

    gradient, nats = jax.grad(loss, has_aux=True)(params)
    updates, state = optimizer(training).update(gradient, state, params)
    return jax.tree.map(jnp.add, params, updates), state, nats


def train(cfg: ModelConfig, training: TrainingConfig, folder: Path, streams: list[np.ndarray]) -> Params:
    """Train from the start, or from the last save in `folder`, to the last step; the trained parameters."""
    saved = folder / "training"
    params = init_params(cfg, jax.random.key(training.seed))
    state, step = optimizer(training).init(params), 0
    if saved.is_dir():
        like = jax.tree.map(np.asarray, {"params": params, "state": state, "step": np.asarray(0)})
        values = read_params(saved, like)
        params, state, step = values["params"], values["state"], int(values["step"])
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as bar:
        task = bar.add_task(f"Training {cfg.name}", total=training.steps, completed=step)
        mean = None
        while step < training.steps:
            batch = draw_batch(streams, training, step)
            params, state, nats = train_step(params, state, batch, cfg, training)
            step += 1
            mean = float(nats) if mean is None else 0.98 * mean + 0.02 * float(nats)
            bar.update(task, completed=step, description=f"Training {cfg.name}: {mean:.3f} nats per token")
            if step % training.save_every == 0 and step < training.steps:
                draft = folder / ".training"
                shutil.rmtree(draft, ignore_errors=True)
                values = {"params": params, "state": state, "step": np.asarray(step)}
                write_params(draft, jax.tree.map(np.asarray, values))
                replace_folder(draft, saved)
    return params


def write_held_out(folder: Path, domains: list[Domain], measure: Callable[[str], float]) -> None:
    """Put a sample of unseen text of each domain, and its bits per byte, beside the model, and print them."""
    stated = {}
    for domain in domains:
        text = "".join(domain.held_out)
        middle = len(text) // 2
        start = text.index("\n\n" if "\n\n" in text[middle:] else "\n", middle) + 1
        sample = text[start : start + SAMPLE].lstrip("\n")
        (folder / "held_out").mkdir(exist_ok=True)
        (folder / "held_out" / f"{domain.name}.txt").write_text(sample, "utf-8")
        stated[domain.name] = round(measure(sample), 3)
        whole = measure(text[:100_000])
        print(f"{domain.name}: {whole:.3f} bits per byte held out, {stated[domain.name]:.3f} on the sample")
    (folder / "held_out" / "bits_per_byte.json").write_text(json.dumps(stated, indent=2) + "\n")


def main(argv: list[str] | None = None) -> None:
    """`moejax train [PRESET] [--out FOLDER] [--unpinned]`: a model folder, and its bits per byte, printed."""
    parser = argparse.ArgumentParser(prog="moejax train", description="Train a small model on three kinds of text.")
    parser.add_argument("preset", nargs="?", default="tiny", help="name in configs/presets, or a TOML file")
    parser.add_argument("--out", type=Path, help="model folder to write (default: build/PRESET)")
    parser.add_argument("--unpinned", action="store_true", help="take the text even if it is not the pinned one")
    options = parser.parse_args(argv)
    path = Path(options.preset)
    cfg, training = load_preset(path if path.suffix == ".toml" else PRESETS / f"{options.preset}.toml")
    folder = options.out or Path("build") / cfg.name
    domains = load_domains(pinned=not options.unpinned)
    work = folder.with_name(folder.name + ".run")
    work.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer(domains, cfg.vocab_size)
    params = train(cfg, training, work, [encode_domain(tokenizer, d) for d in domains])
    half = jax.tree.map(lambda a: np.asarray(a, np.float16), params)
    save_model(folder, cfg, half, tokenizer_json=tokenizer.to_str(), chat_template=CHAT_TEMPLATE.read_text("utf-8"))
    shutil.rmtree(work)
    served = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), half)
    write_held_out(folder, domains, lambda text: bits_per_byte(served, cfg, tokenizer, text))
    print(f"Serve it with: moejax serve --model {folder}")


if __name__ == "__main__":
    main()
