"""XLA's own cost estimate of a compiled step, read from the text of the compiled program.

The compiler for TPUs notes its estimate of cycles at every instruction that it schedules. It counts the body of a loop
once; here a body counts as often as it runs. Loops over layers state their trip count; that of loops over pages and
over tiles of rows depends on the inputs of a step, so the caller gives it. Exchanges and Pallas kernels carry no
estimate and are counted separately.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Mapping, Sequence

HERTZ = {"TPU v4": 1.05e9, "TPU v5 lite": 1.5e9, "TPU v5": 1.75e9, "TPU v6 lite": 1.75e9}
"""Clock by kind of device, from the published peak rate over what the matrix units multiply in a cycle."""

PARTS = ("embed", "attention", "route", "dispatch", "experts", "combine", "shared")
"""The named scopes of `moejax.model`; instructions outside of them count as "rest"."""

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\{$")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_SCOPE = re.compile(rf'op_name="[^"]*/({"|".join(PARTS)})[/"]')
_WHILE = re.compile(r" while\(.*condition=%?([\w.-]+), body=%?([\w.-]+)")
_CALL = re.compile(r" call\(.*to_apply=%?([\w.-]+)")
_EXCHANGE = re.compile(r" = \(?(\w+?)(\d+)\[([\d,]*)\].* all-to-all(?:-start)?\(")
_KERNEL = 'custom_call_target="tpu_custom_call"'
_BOUND = re.compile(r"%?([\w.-]+) = s32\[\][^ ]* constant\((\d+)\)")
_COMPARE = re.compile(r"ROOT .* compare\(%?([\w.-]+), %?([\w.-]+)\), direction=LT")


@dataclasses.dataclass(frozen=True)
class CompiledCost:
    """Cycles by part, and the exchanges of a step: how many, and the bytes a device sends in all of them."""

    cycles: Mapping[str, float]
    exchanges: float
    exchange_bytes: float
    kernels: Mapping[str, float]
    """Calls of kernels, by part."""
    unknown_loops: int
    """Loops whose trip count neither the program nor the caller gives; counted once."""

    def seconds(self, device_kind: str) -> dict[str, float]:
        """Seconds by part on a kind of device; empty when its clock is not known or nothing was estimated."""
        hertz = HERTZ.get(device_kind)
        return {part: cycles / hertz for part, cycles in self.cycles.items()} if hertz else {}


def read_cost(text: str, trip_counts: Mapping[str, float]) -> CompiledCost:
    """The cost of the program whose compiled text this is; `trip_counts` says by part how often its inner loop runs."""
    computations, entry = _computations(text)
    cycles: dict[str, float] = collections.defaultdict(float)
    kernels: dict[str, float] = collections.defaultdict(float)
    exchanges, sent, unknown = 0.0, 0.0, 0

    def walk(name: str, times: float) -> None:
        nonlocal exchanges, sent, unknown
        for line in computations.get(name, ()):
            scope = _SCOPE.search(line)
            part = scope[1] if scope else "rest"
            if found := _CYCLES.search(line):
                cycles[part] += times * int(found[1])
            if _KERNEL in line:
                kernels[part] += times
            if found := _EXCHANGE.search(line):
                exchanges += times
                sent += times * math.prod(int(n) for n in found[3].split(",") if n) * int(found[2]) / 8
            if found := _WHILE.search(line):
                often = _trip_count(computations.get(found[1], ())) or trip_counts.get(part)
                unknown += often is None
                walk(found[2], times * (1.0 if often is None else often))
            elif found := _CALL.search(line):
                walk(found[1], times)

    walk(entry, 1.0)
    return CompiledCost(dict(cycles), exchanges, sent, dict(kernels), unknown)


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    """The lines of each computation, and the name of the first that runs."""
    found: dict[str, list[str]] = {}
    entry, here = "", []
    for line in text.splitlines():
        if start := _COMPUTATION.match(line):
            here = found.setdefault(start[2], [])
            entry = start[2] if start[1] else entry
        elif line.startswith(" "):
            here.append(line)
    return found, entry


def _trip_count(condition: Sequence[str]) -> int | None:
    """Trip count of a loop whose condition compares a counter with a constant; None for other loops."""
    constants = {found[1]: int(found[2]) for line in condition if (found := _BOUND.search(line))}
    compared = next((found for line in condition if (found := _COMPARE.search(line))), None)
    return constants.get(compared[2]) if compared else None
