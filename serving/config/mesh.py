"""Settings of the ranks: how many there are, what each does, and how many slots it has."""

import dataclasses
from typing import ClassVar, Self

from planner.plan.shape import POOLS
from planner.solver.roles import SWITCHES
from planner.solver.shapes import ARCHITECTURES
from serving.config.field import SettingsGroup, setting
from serving.errors import InvalidRequest

MOST_LOCAL_RANKS, MOST_RANKS = 64, 320
"""The most ranks of the front's own machine, and of all hosts: the number that a front was run with, on hosts of 8
(docs/scale.md)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshSettings(SettingsGroup):
    """The ranks of a server and how attention and experts are placed on them."""

    title: ClassVar[str] = "Ranks and placement"

    ranks: int = setting(4, "Number of rank processes; each drives one device.")
    hosts: int = setting(
        1,
        "Number of failure domains that the local ranks count as spread over: placement survives the loss of a whole "
        "one. With launcher join or ray, ranks report their real hosts.",
    )
    arch: str = setting(
        "collocated",
        "Whether every rank runs attention and holds experts (collocated), each rank does one of the two "
        "(disaggregated), or some ranks compute prompts and the others decode, each side a whole model (pd).",
        choices=(*ARCHITECTURES, POOLS),
    )
    attention: int | None = setting(
        None, "Number of attention ranks, with arch disaggregated. Default: the planner chooses."
    )
    experts: int | None = setting(
        None, "Number of expert ranks, with arch disaggregated. Default: all ranks that are not attention ranks."
    )
    prefill: int | None = setting(
        None, "Number of ranks that compute prompts, with arch pd. Default: the planner chooses."
    )
    decode: int | None = setting(
        None, "Number of ranks that decode, with arch pd. Default: all ranks that do not compute prompts."
    )
    tensor: int = setting(
        1, "Number of ranks of one host that split the attention heads among them (with arch collocated)."
    )
    role_switch: str = setting(
        "auto",
        "When an attention rank takes the place of a lost expert rank: if too few expert ranks are left (auto), or at "
        "every loss (always).",
        choices=SWITCHES,
    )
    slots_per_rank: int | None = setting(
        None, "Number of experts of each layer that a rank has buffers for. Default: the planner chooses."
    )
    survive: int = setting(
        1, "Number of rank failures that the placement survives without reallocating weight buffers."
    )

    rebalance: str = setting(
        "off",
        "Whether experts move to other ranks while requests run, when one rank has more of the traffic than "
        "--rebalance-bound in two intervals in a row (auto), or only by `moejax apply rebalance` (off).",
        choices=("off", "auto"),
    )
    rebalance_bound: float = setting(
        1.3, "With rebalance auto: the hottest rank's traffic over the mean from which on experts move.", at_least=1.0
    )
    rebalance_interval_s: float = setting(
        60.0, "With rebalance auto: seconds over which traffic is measured, and between two moves.", at_least=1.0
    )

    def check(self) -> None:
        """Check fields of this group against each other. Raises InvalidRequest."""
        if not 1 <= self.ranks <= MOST_RANKS:
            raise InvalidRequest(f"ranks is {self.ranks}. Choose between 1 and {MOST_RANKS} ranks.", param="ranks")
        self._check_sides("disaggregated", ("attention", "experts"), "must attend or hold experts")
        self._check_sides(POOLS, ("prefill", "decode"), "must compute prompts or decode")
        if not 0 <= self.survive < max(self.ranks, 1) and self.ranks > 1:
            raise InvalidRequest(
                f"survive is {self.survive} with {self.ranks} ranks. Choose between 0 and {self.ranks - 1}.",
                param="survive",
            )
        self._check_tensor()
        if not 1 <= self.hosts <= self.ranks:
            raise InvalidRequest(
                f"hosts is {self.hosts} with {self.ranks} ranks. Choose 1 to {self.ranks}.", param="hosts"
            )

    def host_of(self, rank: int) -> str:
        """The host that a local rank counts as being on: equal runs of ranks, one after the other."""
        return "localhost" if self.hosts == 1 else f"host{rank * self.hosts // self.ranks}"

    def _check_tensor(self) -> None:
        on_host = [self.host_of(rank) for rank in range(self.ranks)]
        for host in dict.fromkeys(on_host):
            if self.tensor < 1 or on_host.count(host) % self.tensor:
                raise InvalidRequest(
                    f"tensor is {self.tensor} with {on_host.count(host)} ranks on {host}: a group is of one host. "
                    f"Choose a divisor of {on_host.count(host)}.",
                    param="tensor",
                )
        if self.tensor > 1 and self.arch != "collocated":
            why = "their entries are not sent yet" if self.arch == POOLS else "attention ranks of that attend alone"
            raise InvalidRequest(
                f"tensor is {self.tensor} with arch {self.arch!r}: {why}. Set tensor to 1, or arch to collocated.",
                param="tensor",
            )

    def _check_sides(self, arch: str, names: tuple[str, str], what: str) -> None:
        """Check the two counts that go with an architecture; both together set `ranks` where it has its default."""
        sides = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        if sides and self.arch != arch:
            raise InvalidRequest(
                f"{' and '.join(sides)} is given with arch {self.arch!r}. Set arch to {arch}.", param="arch"
            )
        if len(sides) == 2 and self.ranks in (sum(sides.values()), type(self).ranks):
            object.__setattr__(self, "ranks", sum(sides.values()))
        open_sides = 2 - len(sides)
        if self.arch == arch and (
            min(sides.values(), default=1) < 1
            or sum(sides.values()) + open_sides > self.ranks
            or (not open_sides and sum(sides.values()) != self.ranks)
        ):
            given = ", ".join(f"{name} {count}" for name, count in sides.items()) or "neither side"
            raise InvalidRequest(
                f"{given} of {self.ranks} ranks: each rank {what}, and each side needs one. "
                f"Give {', '.join(names)} or both.",
                param=next(iter(sides), "ranks"),
            )
        if self.arch == arch == POOLS and len(sides) == 1:
            rest = names[1 - names.index(next(iter(sides)))]
            object.__setattr__(self, rest, self.ranks - sum(sides.values()))

    def for_pool(self, ranks: int) -> Self:
        """The settings of the mesh of one pool of so many ranks. A certificate is of both."""
        survive = min(self.survive, ranks - 1)
        return dataclasses.replace(
            self,
            arch="collocated",
            prefill=None,
            decode=None,
            ranks=ranks,
            hosts=1,
            survive=survive,
            certificate=None,
        )
