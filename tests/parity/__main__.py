"""Compare all models in all ways, and write the results.

    scripts/parity                        everything; needs the extra `parity`, and some 20 minutes of two cores
    scripts/parity --only gpt-oss --way server

Every comparison is kept in docs/results/parity.json, from which docs/results/parity.md is written: a run that does a
part leaves the rest as it was.
"""

import argparse
import contextlib
import dataclasses
from collections.abc import Iterator

import tests.conftest  # noqa: F401 - sets how JAX runs, before it is asked for devices
from moejax.ops import cpu
from tests.parity.programs import compare
from tests.parity.records import KILLED, PROGRAMS, SERVER, Record, load, save
from tests.parity.server import compare_served
from tests.support.families.published import ALL


def compared(name: str, way: str, ranks: int, seed: int) -> Iterator[Record]:
    """Compare one model in one way."""
    case = ALL[name]
    if way == PROGRAMS:
        yield Record(model=name, way=way, ranks=ranks, seed=seed, found=compare(case, seed, ranks))
        return
    for setup, found in zip((SERVER, KILLED), compare_served(case, seed, ranks), strict=True):
        yield Record(model=name, way=setup, ranks=ranks, seed=seed, found=found)


def main() -> int:
    """Compare what the command line says; the exit status is 1 if any differs."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=ALL, default=list(ALL), metavar="MODEL")
    parser.add_argument("--way", choices=(PROGRAMS, SERVER), help="default: both; a server is killed as well")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 4], help="a server needs 2 to lose one")
    parser.add_argument("--seeds", type=int, default=3, help="of the programs; a server is asked with one")
    parser.add_argument("--missing", action="store_true", help="only what parity.json has not")
    given = parser.parse_args()
    with contextlib.suppress(cpu.KernelError):
        cpu.load()
    kept, good = load(), True
    for name, way, ranks, seed in plans(given):
        if given.missing and any((r.model, r.way, r.ranks, r.seed) == (name, way, ranks, seed) for r in kept.values()):
            continue
        for record in compared(name, way, ranks, seed):
            kept[record.key] = record
            good &= record.found.holds
            print(*dataclasses.astuple(record), sep="  ", flush=True)
        save(kept)
    return 0 if good else 1


def plans(given: argparse.Namespace) -> Iterator[tuple[str, str, int, int]]:
    """Model, way, ranks and seed of all that was asked for."""
    for name in given.only:
        for ranks in given.ranks:
            if given.way != SERVER:
                yield from ((name, PROGRAMS, ranks, seed) for seed in range(given.seeds))
            if given.way != PROGRAMS and ranks > 1:
                yield name, SERVER, ranks, 0


if __name__ == "__main__":
    raise SystemExit(main())
