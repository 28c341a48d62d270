"""All settings of a server in one frozen value, from a TOML file, MOEJAX_ variables and flags."""

import dataclasses
import difflib
import os
import typing
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

from planner.plan.shape import POOLS
from serving.config.cache import CacheSettings
from serving.config.detection import DetectionSettings
from serving.config.durability import DurabilitySettings
from serving.config.field import SettingsGroup
from serving.config.http import HttpSettings
from serving.config.launch import LaunchSettings
from serving.config.mesh import MOST_LOCAL_RANKS, MeshSettings
from serving.config.model import ModelSettings
from serving.config.network import NetworkSettings, is_loopback, split_address
from serving.config.observability import ObservabilitySettings
from serving.config.recovery import RecoverySettings
from serving.config.scheduling import SchedulingSettings
from serving.config.security import SecuritySettings
from serving.config.sources import ALIASES, RENAMED, current_names, parse, read_environment, read_file, toml_value
from serving.errors import InvalidRequest

GROUPS: tuple[type[SettingsGroup], ...] = (
    ModelSettings,
    MeshSettings,
    NetworkSettings,
    HttpSettings,
    SchedulingSettings,
    CacheSettings,
    RecoverySettings,
    DetectionSettings,
    DurabilitySettings,
    LaunchSettings,
    SecuritySettings,
    ObservabilitySettings,
)
"""The groups of `Settings`, in the order of help and documentation."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(
    ObservabilitySettings,
    SecuritySettings,
    LaunchSettings,
    DurabilitySettings,
    DetectionSettings,
    RecoverySettings,
    CacheSettings,
    SchedulingSettings,
    HttpSettings,
    NetworkSettings,
    MeshSettings,
    ModelSettings,
):
    """All settings of one server. It is an instance of each group, so that a component can ask for the group it needs.

    Raises InvalidRequest, with `param` naming the setting, when a value is out of bounds or contradicts another.
    """

    deprecations: ClassVar[tuple[str, ...]] = ()
    """Notes for the log: names and values of earlier releases that `load` was given."""

    def check(self) -> None:
        """Check each group, then the groups against each other. Raises InvalidRequest."""
        for group in GROUPS:
            group.check(self)
        if not 0 <= self.parity < self.ranks:
            raise InvalidRequest(
                f"parity is {self.parity} with {self.ranks} ranks: each expert of a group is on a rank of its own, and "
                f"their parity on one more. Choose 0 to {self.ranks - 1}.",
                param="parity",
            )
        if self.arch == POOLS:
            self._check_pools()
        self._check_edges()
        if self.speculate == "mtp":
            self._check_mtp()
        if self.launcher == "local":
            if self.ranks > MOST_LOCAL_RANKS:
                raise InvalidRequest(
                    f"ranks is {self.ranks}, and one machine runs at most {MOST_LOCAL_RANKS}. Choose fewer; or, with "
                    "launcher join or ray, ranks on other hosts.",
                    param="ranks",
                )
            return
        if self.kv_replication == "memory":
            raise InvalidRequest(
                f"kv_replication is memory with launcher {self.launcher}: ranks elsewhere cannot write to the memory "
                "of this machine. Choose stream or off.",
                param="kv_replication",
            )
        if self.hosts != 1:
            raise InvalidRequest(
                f"hosts is {self.hosts} with launcher {self.launcher}: ranks elsewhere say themselves which host "
                "they are on. Leave it out.",
                param="hosts",
            )

    def _check_edges(self) -> None:
        """Check what edges on other hosts need. Raises InvalidRequest."""
        if self.edge_listen is None:
            return
        if not self.supervise:
            raise InvalidRequest(
                f"edge_listen is {self.edge_listen} without a supervisor: edges wait for the front that follows a dead "
                "one, which a supervisor starts. Leave out --no-supervise.",
                param="supervise",
            )
        if (
            self.rank_tls_cert is None
            and not self.rank_plaintext
            and not is_loopback(split_address(self.edge_listen)[0])
        ):
            raise InvalidRequest(
                f"edge_listen is {self.edge_listen}, and without TLS anybody on the way can read prompts and answers "
                "and take the token. Give rank_tls_cert and rank_tls_key; or, on a network of yours, rank_plaintext.",
                param="rank_tls_cert",
            )

    def _check_mtp(self) -> None:
        """Check what a layer of multi-token prediction cannot be combined with yet. Raises InvalidRequest."""
        refused = {
            "arch": (
                self.arch not in ("collocated", POOLS),
                "its layer runs where ranks hold experts and attend",
                "collocated",
            ),
            "kv_cache_type": (
                self.kv_cache_type not in ("auto", "float32"),
                "the entries of its layer are in float32",
                "float32",
            ),
            "tensor": (self.tensor > 1, "its layer is not sharded over tensor groups", "1"),
        }
        for name, (given, why, instead) in refused.items():
            if given:
                raise InvalidRequest(
                    f"{name} is {getattr(self, name)!r} with speculate 'mtp': {why}. Set it to {instead}, or speculate "
                    "to ngram.",
                    param=name,
                )

    def _check_pools(self) -> None:
        """Check what pools for prompts and for decode cannot be combined with. Raises InvalidRequest."""
        refused = {
            "kv_replication": (
                self.kv_replication == "off",
                "a request goes to its decode rank by the replica of its prefill rank",
                "auto",
            ),
            "parity": (self.parity > 0, "it is made in one mesh, and each pool has its own", "0"),
        }
        for name, (given, why, instead) in refused.items():
            if given:
                raise InvalidRequest(
                    f"{name} is {getattr(self, name)!r} with arch {self.arch!r}: {why}. Set it to {instead}, or arch "
                    "to collocated.",
                    param=name,
                )

    @classmethod
    def load(
        cls,
        file: Path | None = None,
        environment: Mapping[str, str] = os.environ,
        *,
        only: Collection[str] | None = None,
        **flags: Any,
    ) -> Self:
        """Settings from a TOML file, then MOEJAX_ variables, then flags that are not None; the last source wins. With
        `only` the file and the variables may have others too, which are not used.

        Raises InvalidRequest on an unknown key, naming the nearest, and on a value of the wrong type.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        sources = (
            read_file(Path(file)) if file is not None else {},
            read_environment(environment, known | RENAMED.keys() | ALIASES.keys()),
            {name: value for name, value in flags.items() if value is not None},
        )
        values: dict[str, Any] = {}
        notes: list[str] = []
        for source in sources:
            values |= current_names(source, notes)
        for key in values:
            if key not in known:
                near = difflib.get_close_matches(key, known, n=1)
                hint = f" Did you mean {near[0]!r}?" if near else ""
                raise InvalidRequest(f"unknown setting {key!r}.{hint}", param=key)
        if only is not None:
            values = {key: value for key, value in values.items() if key in only}
        types = typing.get_type_hints(cls)
        settings = cls(**{key: parse(key, value, types[key]) for key, value in values.items()})
        object.__setattr__(settings, "deprecations", tuple(notes))
        return settings

    def to_toml(self) -> str:
        """All settings that have a value, as a TOML file that `load` reads."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return "".join(f"{name} = {toml_value(value)}\n" for name, value in values.items() if value is not None)
