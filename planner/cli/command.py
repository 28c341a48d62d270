"""Shared by all commands: their result, and the reading and writing of common options."""

from __future__ import annotations

import importlib
from argparse import Namespace
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType

from planner.errors import InputError, unknown_key
from planner.failures.loss_model import LossModel
from planner.failures.pool_losses import PoolLossModel
from planner.inputs.recovery_times import read_recovery_times
from planner.plan.deployment import Deployment
from planner.plan.pools import PooledDeployment, read_any_deployment


@dataclass(frozen=True, kw_only=True)
class CommandResult:
    """The result of a command: data for --json, text for a terminal, and `good`, False for exit code 1.

    Lines of the text are folded to the terminal's width, unless it is `verbatim`.
    """

    data: object
    text: str
    good: bool = True
    verbatim: bool = False


def with_store(deployment: Deployment, store: str | None) -> Deployment:
    """The deployment with lost experts read from `store`; as it is when None."""
    if store is None:
        return deployment
    cluster = deployment.cluster
    return replace(deployment, cluster=replace(cluster, hardware=replace(cluster.hardware, store=store)))


def read_losses(options: Namespace, means: Collection[str], *, one_front: bool = True) -> LossModel | PoolLossModel:
    """The losses of the plan file `options.plan`, of pools or not, with the `--store` and the phases (`--measured`)
    that the options give, and the `means` of recovery allowed."""
    found = read_any_deployment(options.plan)
    times = read_recovery_times(options.measured) if options.measured else None
    if isinstance(found, PooledDeployment):
        pooled = found.each(lambda pool: with_store(pool, options.store))
        return PoolLossModel(pooled, times, means, one_front=one_front)
    return LossModel(with_store(found, options.store), times, means, one_front=one_front)


def read_words(text: str, known: tuple[str, ...], where: str) -> list[str]:
    """The comma-separated words of `text`. InputError naming a word that is not `known`."""
    words = [w.strip() for w in text.split(",") if w.strip()]
    for word in words:
        if word not in known:
            raise unknown_key(word, known, where)
    return words


def write_text(path: str | None, text: str) -> None:
    """Write `text` to `path`, if there is one."""
    if path:
        try:
            Path(path).write_text(text)
        except OSError as error:
            raise InputError(f"cannot write {path}: {error.strerror}") from None


def pictures() -> ModuleType:
    """The module of plots, imported here since it needs matplotlib, which other commands do not."""
    try:
        return importlib.import_module("planner.cli.plots")
    except ModuleNotFoundError as error:
        raise InputError(f"--pictures needs {error.name}: pip install matplotlib") from None
