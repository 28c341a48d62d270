"""Makes a model ready to serve: finds or builds its folder and copies its weights into the host's memory.

    python -m moejax.tools.prepare [--mtp] MODEL FORMAT [in-place|sharded|replicated [TENSOR [CACHE [LIKE]]]]

Progress on standard error, one line of JSON on standard output.

A process of its own, because the front of the server never imports JAX.
"""

import dataclasses
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

from moejax.checkpoint.download import cache_folder
from moejax.checkpoint.families import read_config
from moejax.checkpoint.host_store import HostStore
from moejax.checkpoint.manifest import content_hash
from moejax.checkpoint.published import check_mtp_packed, packed_form, published_name
from moejax.checkpoint.published_store import SOURCE, PublishedStore, recorded_form
from moejax.checkpoint.safetensors import SafetensorsFolder
from moejax.config.config_values import ConfigError
from moejax.config.kv_cache import bytes_per_token
from moejax.config.layer_states import state_bytes
from moejax.config.model_config import PACKED_FORMATS, ModelConfig
from moejax.config.packed_form import PackedForm
from moejax.config.parameter_counts import expert_counts, parameter_count
from moejax.config.weight_formats import bytes_per_expert, weight_bytes
from moejax.ops import cpu
from moejax.runtime.executables import numerics_fingerprint
from moejax.tools.rank_format import (
    AUTO,
    PUBLISHED,
    format_as_stored,
    published_workload,
    stored_note,
    widening_note,
)
from moejax.tools.resolve import (
    ensure_checksums,
    ensure_model,
    ensure_sharded_dense,
    is_published,
    published_place,
)
from moejax.tools.same_model import check_same_dtypes, check_same_model, unused_files

MTP = "--mtp"
"""The flag that asks for the layer of multi-token prediction."""
BESIDE_STEPS = 10
"""Niceness of this process while the model that it is compared with is served on this machine."""


def prepare(
    name: str,
    weights: str = "float32",
    how: str = "",
    tensor: str = "1",
    cache: str = AUTO,
    like: str = "",
    *,
    mtp: bool = False,
) -> dict[str, object]:
    """Prepare a model and describe it for the front.

    `serving.protocol.prepared_model.PreparedModel.from_json` reads the keys. `weights` is the weight format, or
    `published`, or `auto`, the one in the model's own configuration; that of a model as it is published (`mxfp4`) asks
    for `published` and has to come out. `cache` is the cache format, or `auto`, float32.
    Published folders are converted, or read in place if `how` is `in-place` or ranks hold matrices as they are
    published; dense layers are replicated, or sharded if `how` is `sharded`. Raises ConfigError for heads that cannot
    be sharded over groups of `tensor` ranks, of published folders before anything is converted. With `like`, the folder
    of another model, raises ConfigError or CheckpointError, also before that, unless both differ in their weights
    alone. With `mtp` the model has its layer of multi-token prediction; raises ConfigError or CheckpointError for one
    that has none.
    """
    name = str(published_place(Path(name)))
    if like:
        check_same_model(Path(name), Path(like), sharded=how == "sharded")
    if is_published(Path(name)):
        read_config(Path(name), mtp=mtp).tp_shard(int(tensor))
    wanted = weights
    weights = PUBLISHED if weights in PACKED_FORMATS else weights
    folder = prepared_folder(name, weights, how, mtp=mtp)
    store = PublishedStore.open(folder) if (folder / SOURCE).is_file() else HostStore.create(folder)
    cfg = _held_config(name, store, weights, how, int(tensor))
    cfg = dataclasses.replace(cfg, cache_format="float32" if cache == AUTO else cache, mtp=mtp)
    if wanted in PACKED_FORMATS:
        served = recorded_form(Path(like)) if like else None
        _check_form(name, cfg, wanted, served=_without_shards(served, int(tensor)))
    if like:
        check_same_dtypes(folder, Path(like))
    cfg.tp_shard(int(tensor))
    moe = cfg.moe
    return {
        "name": cfg.name,
        "config": cfg.to_json(),
        "folder": str(folder),
        "store": str(store.folder),
        "executables": str(cache_folder() / "executables"),
        "steps": str(cache_folder() / "steps"),
        "content": content_hash(folder),
        "numerics": numerics_fingerprint(),
        "vocab_size": cfg.vocab_size,
        "max_context": cfg.max_context,
        "original_context": cfg.original_context,
        "stop_tokens": cfg.stop_tokens,
        "bos_token": cfg.bos_token,
        "layers": cfg.depth,
        "moe_layers": cfg.n_moe_layers,
        "divided_layers": cfg.sharded_layers,
        "experts": moe.experts if moe else 0,
        "experts_per_token": moe.experts_per_token if moe else 0,
        "parameters": parameter_count(cfg),
        "expert_bytes": bytes_per_expert(cfg),
        "rest_bytes": weight_bytes(cfg, experts=False),
        "weights": cfg.weights,
        "cache_format": cfg.cache_format,
        "cache_bytes_per_token": bytes_per_token(cfg),
        "state_bytes": state_bytes(cfg),
        "unused_files": unused_files(folder, Path(like)) if like else (),
        "hidden_bytes": 4 * cfg.d_model,
        "heads": cfg.n_heads,
        **flops(cfg),
    }


def prepared_folder(name: str, weights: str, how: str, *, mtp: bool) -> Path:
    """The folder of a model in our form, or of the checksums of a published one, made now if need be. Arguments as for
    `prepare`."""
    keeps = weights in (PUBLISHED, *PACKED_FORMATS) and how != "sharded" and _keeps_form(name, mtp=mtp)
    if (how == "in-place" or keeps) and is_published(Path(name)):
        return ensure_checksums(Path(name), mtp=mtp)
    folder = ensure_model(name, mtp=mtp)
    return ensure_sharded_dense(folder) if how == "sharded" else folder


def _held_config(name: str, store: HostStore | PublishedStore, weights: str, how: str, tensor: int) -> ModelConfig:
    """The model in the format in which ranks hold its weights, which is said where they are widened."""
    published = published_workload(Path(name)) if is_published(Path(name)) else None
    as_published, form = weights == PUBLISHED, None
    if weights == AUTO:
        weights = store.cfg.weights
    elif as_published:
        form = store.packed if isinstance(store, PublishedStore) else None
        weights = format_as_stored(store.cfg, store.dtypes, published)
    form = _without_shards(form, tensor)
    cfg = dataclasses.replace(store.cfg, weights=weights) if form is None else store.cfg.with_packed(form)
    own = as_published and published is None and not isinstance(store, PublishedStore)
    sharded = how == "sharded" and as_published
    if note := stored_note(cfg, store.dtypes) if own else widening_note(cfg, published, sharded=sharded):
        print(note, file=sys.stderr)
    return cfg


def _without_shards(form: PackedForm | None, tensor: int) -> PackedForm | None:
    """The form of matrices that are not sharded over tensor groups: shards of heads end within groups."""
    return form.without("heads") if form is not None and tensor > 1 else form


def _check_form(name: str, cfg: ModelConfig, weights: str, *, served: PackedForm | None) -> None:
    """Raise ConfigError unless ranks can hold a model in the format `weights`, in the form of the `served` one if that
    is known."""
    way_out = f"Publish the weights in the same form, or start a server with them: moejax serve --model {name}."
    if cfg.weights != weights:
        raise ConfigError(
            f"{name} is held in {cfg.weights} as it is published, and the model that is served in {weights}. {way_out}"
        )
    if served is not None and cfg.packed is not None and (found := cfg.packed.of(served.parts)) != served:
        held = found or cfg.packed
        raise ConfigError(f"{name} can be held as {held}, and the served model is {served}. {way_out}")


def _keeps_form(name: str, *, mtp: bool) -> bool:
    """Whether ranks can hold matrices of a model as they are published, as far as the headers show. Such a folder is
    read in place: a conversion would widen them. Raises CheckpointError as `check_mtp_packed`."""
    folder = Path(name)
    if not is_published(folder):
        return False
    if mtp:
        check_mtp_packed(folder)
    cfg = read_config(folder, name=published_name(folder), mtp=mtp)
    return packed_form(cfg, SafetensorsFolder.open(folder)) is not None


def flops(cfg: ModelConfig) -> dict[str, float]:
    """Work per token, a multiply-add being two: of one expert (on average over all that a token goes to, the shards of
    sharded dense layers among them), of all else, and of attention, with its
    indexer, per token of context."""
    held, used = expert_counts(cfg)
    rest = parameter_count(cfg) - held
    looked_up = 0 if cfg.tied_head else cfg.vocab_size * cfg.d_model
    scored = cfg.indexer.heads * cfg.indexer.d_key if cfg.indexer else 0
    return {
        "expert_flops": 2.0 * used / (cfg.n_moe_layers * cfg.moe.experts_per_token) if cfg.moe else 0.0,
        "rest_flops": 2.0 * (rest - looked_up),
        "context_flops": 2.0 * sum(_products(cfg.of_layer(i)) + scored for i in cfg.attention_layers),
    }


def _products(cfg: ModelConfig) -> int:
    """Numbers of all heads that attention multiplies for one position of the context."""
    latent = cfg.latent
    return cfg.n_heads * (latent.d_rope + 2 * latent.d_latent if latent else cfg.d_head + cfg.value_size)


def _build_kernels() -> None:
    """Build the CPU kernels once, before several ranks need them, and load them: the last bits of results depend on
    them."""
    try:
        cpu.load()
    except cpu.KernelError as error:
        print(error, file=sys.stderr)


def main() -> int:
    """Prepare the model named on the command line; the exit status is 1 with one line of cause when it cannot be."""
    given = [each for each in sys.argv[1:] if each != MTP]
    if len(given) > len(("MODEL", "FORMAT", "HOW", "TENSOR", "CACHE")):
        os.nice(BESIDE_STEPS)

    def work() -> None:
        _build_kernels()
        print(json.dumps(prepare(*given, mtp=MTP in sys.argv)))

    return exit_status(work)


def exit_status(work: Callable[[], None]) -> int:
    """The exit status of a process that does this for a server: 1, with one line of cause, when it cannot be done."""
    try:
        work()
    except (OSError, ValueError, RuntimeError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
