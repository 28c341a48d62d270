"""Makes a model ready to be served: finds or builds its folder, copies its weights into the host's memory.

    python -m moejax.prepare MODEL FORM [in-place|divided]

Progress on standard error, one line of JSON on standard output.

A process of its own, because the front of the server never imports JAX.
"""

import dataclasses
import json
import sys
from pathlib import Path

from moejax import kernels
from moejax.assets import ensure_divided, ensure_model, ensure_noted, is_published
from moejax.cache import bytes_per_token
from moejax.config import ModelConfig
from moejax.download import cache_folder
from moejax.executables import numerics
from moejax.manifest import content_hash
from moejax.params import expert_counts, parameter_count
from moejax.precision import held_bytes
from moejax.published_store import PublishedStore
from moejax.store import HostStore


def prepare(name: str, weights: str = "float32", how: str = "") -> dict[str, object]:
    """What the front needs to know of a model whose matrices ranks hold in this form (`moejax.precision`); the field
    names are those of `serving.prepared.Prepared`. Published folders are converted, or read `in-place`; dense layers
    are whole, or `divided`."""
    store: HostStore | PublishedStore
    if how == "in-place" and is_published(Path(name)):
        folder = ensure_noted(Path(name))
        store = PublishedStore.open(folder)
    else:
        folder = ensure_model(name)
        if how == "divided":
            folder = ensure_divided(folder)
        store = HostStore.create(folder)
    cfg: ModelConfig = dataclasses.replace(store.cfg, weights=weights)
    moe = cfg.moe
    in_experts = held_bytes(cfg, experts=True)
    return {
        "name": cfg.name,
        "config": cfg.to_json(),
        "folder": str(folder),
        "store": str(store.folder),
        "executables": str(cache_folder() / "executables"),
        "steps": str(cache_folder() / "steps"),
        "content": content_hash(folder),
        "numerics": numerics(),
        "vocab_size": cfg.vocab_size,
        "max_context": cfg.max_context,
        "stop_tokens": cfg.stop_tokens,
        "bos_token": cfg.bos_token,
        "layers": cfg.n_layers,
        "moe_layers": cfg.n_moe_layers,
        "divided_layers": cfg.divided_layers,
        "experts": moe.experts if moe else 0,
        "experts_per_token": moe.experts_per_token if moe else 0,
        "parameters": parameter_count(cfg),
        "expert_bytes": in_experts // (cfg.n_moe_layers * moe.experts) if moe else 0,
        "rest_bytes": held_bytes(cfg, experts=False),
        "weights": cfg.weights,
        "cache_bytes_per_token": bytes_per_token(cfg),
        "hidden_bytes": 4 * cfg.d_model,
        "heads": cfg.n_heads,
        **flops(cfg),
    }


def flops(cfg: ModelConfig) -> dict[str, float]:
    """Work per token, a multiply-add being two: of one expert (on average over all that a token goes to, the shards of
    divided layers among them), of all else, and of attention per token of context."""
    held, used = expert_counts(cfg)
    rest = parameter_count(cfg) - held
    looked_up = 0 if cfg.tied_head else cfg.vocab_size * cfg.d_model
    a_position = cfg.latent.d_rope + 2 * cfg.latent.d_latent if cfg.latent else 2 * cfg.d_head
    return {
        "expert_flops": 2.0 * used / (cfg.n_moe_layers * cfg.moe.experts_per_token) if cfg.moe else 0.0,
        "rest_flops": 2.0 * (rest - looked_up),
        "context_flops": 2.0 * cfg.n_layers * cfg.n_heads * a_position,
    }


def _build_kernels() -> None:
    """Once, before several ranks look for them; slower without. Loaded as well: they decide about the last bits."""
    try:
        kernels.load()
    except kernels.KernelError as error:
        print(error, file=sys.stderr)


def main() -> int:
    """Prepare the model named on the command line; the exit status is 1 with one line of cause when it cannot be."""
    try:
        _build_kernels()
        print(json.dumps(prepare(*sys.argv[1:])))
    except (OSError, ValueError, RuntimeError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
