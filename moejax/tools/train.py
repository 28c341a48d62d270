"""Train a small model on the three-domain text: `moejax train`; or the layer with which a model drafts: `--mtp FOLDER`.

A run is a function of its preset: batches are drawn by (seed, step), so a run that was stopped and resumed
ends with the model of a run that was not. AdamW with a warm-up and a cosine, and the routers' balance loss.

A layer of multi-token prediction learns the token after the next from the model's hidden states (arXiv 2412.19437,
section 2.2); the model itself does not change, in no bit.
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
from jaxtyping import Bool, Int
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

from moejax.checkpoint.checkpoint import load_params, read_params, save_model, write_params
from moejax.checkpoint.model_folder import replace_folder
from moejax.checkpoint.mtp_head import HEAD, save_head
from moejax.config.axes import ArrayLike
from moejax.config.config_values import ConfigError, build_config
from moejax.config.model_config import ModelConfig
from moejax.config.params import Layer, MTPWeights, Params, init_params
from moejax.model.reference import draft_logits, forward, hidden_states, next_token_losses
from moejax.tools.corpus import Domain, load_domains
from moejax.tools.score import bits_per_byte
from planner.inputs.shipped import shipped

PRESETS = shipped("configs/presets")
END_OF_TEXT = "<|endoftext|>"
SAMPLE = 6000
"""Characters of held-out text kept with the model."""
CHECKED = 500
"""Tokens of held-out text on which drafts are counted."""
DraftLayer = tuple[MTPWeights | None, tuple[Layer, ...]]
"""The parameters that multi-token prediction adds to a model."""
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


def load_preset(path: Path, table: str = "training") -> tuple[ModelConfig, TrainingConfig]:
    """Read a preset with a `[model]` and a `[training]` table, or one of another name. Raises ConfigError on what it
    cannot be."""
    with path.open("rb") as file:
        tables = tomllib.load(file)
    try:
        training = dict(tables[table])
        training["phases"] = tuple(build_config(TrainingPhase, phase, "phase") for phase in training["phases"])
        model = ModelConfig.from_json(json.dumps(tables["model"]))
    except KeyError as error:
        raise ConfigError(f"{path} lacks the table or key {error}.") from None
    try:
        return model, build_config(TrainingConfig, training, table)
    except ConfigError as error:
        raise ConfigError(f"{path}, table {table}: {error}") from None


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

    def decays(params: Params | DraftLayer) -> Any:
        def spared(path: Any) -> bool:
            return any(word in jax.tree_util.keystr(path) for word in ("norm", "bias"))

        return jax.tree_util.tree_map_with_path(lambda path, _: not spared(path), params)

    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(rate, b2=0.98, weight_decay=training.weight_decay, mask=decays),
    )


def _capacity(rows: int, cfg: ModelConfig, training: TrainingConfig) -> int | None:
    """Rows of so many that an expert computes in training; None for a model without experts."""
    if cfg.moe is None:
        return None
    return min(rows, int(rows * cfg.moe.experts_per_token / cfg.moe.experts * training.capacity_factor))


@partial(jax.jit, static_argnames=("cfg", "training"), donate_argnames=("params", "state"))
def train_step(
    params: Params, state: Any, tokens_BS: Int[ArrayLike, "B S"], cfg: ModelConfig, training: TrainingConfig
) -> tuple[Params, Any, jax.Array]:
    """One step of AdamW on `tokens_BS`; the loss is in nats per token, without the balance part."""

    def loss(params: Params) -> tuple[jax.Array, jax.Array]:
        capacity = _capacity(tokens_BS[:, 1:].size, cfg, training)
        logits, routing = forward(params, cfg, tokens_BS[:, :-1], capacity=capacity)
        nats = next_token_losses(logits, tokens_BS[:, 1:]).mean()
        return nats + training.balance * routing.balance.sum(), nats

    gradient, nats = jax.grad(loss, has_aux=True)(params)
    updates, state = optimizer(training).update(gradient, state, params)
    return jax.tree.map(jnp.add, params, updates), state, nats


@partial(jax.jit, static_argnames=("cfg", "training"), donate_argnames=("layer", "state"))
def draft_step(
    layer: DraftLayer,
    params: Params,
    state: Any,
    tokens_BS: Int[ArrayLike, "B S"],
    cfg: ModelConfig,
    training: TrainingConfig,
) -> tuple[DraftLayer, Any, jax.Array]:
    """One step of AdamW on the layer of multi-token prediction of `params`; the loss is in nats per token after the
    next."""
    hidden, _ = hidden_states(params, cfg, tokens_BS[:, :-2])

    def loss(layer: DraftLayer) -> tuple[jax.Array, jax.Array]:
        whole = with_layer(params, layer)
        logits, routing = draft_logits(
            whole, cfg, hidden, tokens_BS[:, 1:-1], capacity=_capacity(tokens_BS[:, 2:].size, cfg, training)
        )
        nats = next_token_losses(logits, tokens_BS[:, 2:]).mean()
        balance = 0.0 if routing is None else training.balance * routing.balance.sum()
        return nats + balance, nats

    gradient, nats = jax.grad(loss, has_aux=True)(layer)
    updates, state = optimizer(training).update(gradient, state, layer)
    return jax.tree.map(jnp.add, layer, updates), state, nats


def layer_of(params: Params) -> DraftLayer:
    """The layer of multi-token prediction of a model."""
    return params.mtp, params.segments[-1]


def with_layer(params: Params, layer: DraftLayer) -> Params:
    """The model with another layer of multi-token prediction."""
    mtp, segment = layer
    return dataclasses.replace(params, mtp=mtp, segments=(*params.segments[:-1], segment))


def train_mtp(folder: Path, training: TrainingConfig, domains: list[Domain]) -> None:
    """Train a layer of multi-token prediction for the model in a folder of ours, which stays as it is, and write it to
    `FOLDER/mtp`. Prints how often it is right on held-out text."""
    main = ModelConfig.load(folder)
    cfg = dataclasses.replace(main, mtp=True)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    streams = [encode_domain(tokenizer, domain) for domain in domains]
    model, fresh = load_params(folder, main), init_params(cfg, jax.random.key(training.seed))
    params = jax.tree.map(
        jnp.asarray, dataclasses.replace(model, mtp=fresh.mtp, segments=(*model.segments, fresh.segments[-1]))
    )
    layer = layer_of(params)
    state = optimizer(training).init(layer)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as bar:
        task, mean = bar.add_task(f"Training the drafts of {cfg.name}", total=training.steps), None
        for step in range(training.steps):
            batch = draw_batch(streams, training, step)
            layer, state, nats = draft_step(jax.tree.map(jnp.array, layer), params, state, batch, cfg, training)
            mean = float(nats) if mean is None else 0.98 * mean + 0.02 * float(nats)
            bar.update(task, completed=step + 1, description=f"Training the drafts of {cfg.name}: {mean:.3f} nats")
    half = jax.tree.map(lambda a: np.asarray(a, np.float16), with_layer(params, layer))
    save_head(folder, cfg, half)
    served = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), half)
    for domain in domains:
        tokens = np.asarray(tokenizer.encode("".join(domain.held_out)[:SAMPLE]).ids[:CHECKED], np.int32)
        right = agreement(served, cfg, jnp.asarray(tokens[None]))
        print(f"{domain.name}: {right:.0%} of drafts are the model's own likeliest token, on held-out text")


def agreement(params: Params, cfg: ModelConfig, tokens_BT: Int[ArrayLike, "B T"]) -> float:
    """Share of positions of a text at which the draft is the token that the model finds likeliest."""
    return float(_agreeing(params, cfg, tokens_BT).mean())


@partial(jax.jit, static_argnames=("cfg",))
def _agreeing(params: Params, cfg: ModelConfig, tokens_BT: Int[ArrayLike, "B T"]) -> Bool[jax.Array, "B drafted"]:
    hidden, _ = hidden_states(params, cfg, tokens_BT)
    drafts, _ = draft_logits(params, cfg, hidden[:, :-1], tokens_BT[:, 1:])
    own, _ = forward(params, cfg, tokens_BT)
    return drafts.argmax(-1) == own[:, 1:].argmax(-1)


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
    """`moejax train [PRESET] [--out FOLDER] [--unpinned]`: a model folder, and its bits per byte, printed; or with
    `--mtp FOLDER` the layer with which that model drafts."""
    parser = argparse.ArgumentParser(prog="moejax train", description="Train a small model on three kinds of text.")
    parser.add_argument("preset", nargs="?", default="tiny", help="name in configs/presets, or a TOML file")
    parser.add_argument("--out", type=Path, help="model folder to write (default: build/PRESET)")
    parser.add_argument("--unpinned", action="store_true", help="take the text even if it is not the pinned one")
    parser.add_argument("--mtp", type=Path, metavar="FOLDER", help="train the layer that drafts for this model folder")
    options = parser.parse_args(argv)
    path = Path(options.preset)
    path = path if path.suffix == ".toml" else PRESETS / f"{options.preset}.toml"
    if options.mtp is not None:
        if options.out is not None:
            parser.error(f"--mtp {options.mtp} writes the layer into that folder: leave out --out {options.out}")
        if ModelConfig.load(options.mtp).mtp:
            parser.error(f"--mtp {options.mtp}: that model holds a layer that drafts already. Give the one without.")
        _, training = load_preset(path, "mtp")
        train_mtp(options.mtp, training, load_domains(pinned=not options.unpinned))
        print(f"Written to {options.mtp / HEAD}. Serve it with: moejax serve --model {options.mtp} --speculate mtp")
        return
    cfg, training = load_preset(path)
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
