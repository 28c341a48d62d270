"""Compare all models in all ways, and write the results.

    scripts/parity                        everything; needs the extra `parity`, and some 20 minutes of two cores
    scripts/parity --only gpt-oss --ways server --seeds 1

Every comparison is kept in docs/results/parity.json, from which docs/results/parity.md is written: a run that does a
part leaves the rest as it was.
"""

import argparse
import contextlib
import dataclasses
import importlib.metadata
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import tests.conftest  # noqa: F401 - sets how JAX runs, before it is asked for devices
from moejax import kernels
from tests.moejax.families.published import CASES
from tests.parity.comparison import DECODED, PROMPT, TOLERANCE, Comparison
from tests.parity.programs import compare
from tests.parity.server import compare_served

RESULTS = Path("docs/results")
PROGRAMS, SERVER, KILLED = "programs", "server", "server, killed"
HOW = {
    PROGRAMS: "step programs over a mesh of devices within one process",
    SERVER: "a server with a process for each rank, asked over gRPC",
    KILLED: "the same; SIGKILL to the rank that has the request once a third of its tokens are there",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Record:
    """One comparison, by what was compared."""

    model: str
    way: str
    ranks: int
    seed: int
    found: Comparison

    @property
    def key(self) -> tuple[int, int, int, int]:
        """What no other record has, in the order of the table."""
        return list(CASES).index(self.model), list(HOW).index(self.way), self.ranks, self.seed


def load(path: Path) -> dict[tuple[int, int, int, int], Record]:
    """The records of earlier runs, of models that there still are."""
    if not path.is_file():
        return {}
    rows = [row for row in json.loads(path.read_text())["records"] if row["model"] in CASES]
    records = [Record(**row | {"found": Comparison(**row["found"])}) for row in rows]
    return {record.key: record for record in records}


def versions() -> dict[str, str]:
    """Of what was compared, and whether it ran on the kernels of `moejax.kernels`, where a model's parts have one."""
    kind = "our CPU kernels" if kernels.active() else "XLA alone"
    return {name: importlib.metadata.version(name) for name in ("jax", "transformers", "torch")} | {"with": kind}


def save(path: Path, records: Iterable[Record]) -> None:
    """Write the records, a line each."""
    rows = ",\n".join(json.dumps(dataclasses.asdict(record)) for record in records)
    path.write_text(f'{{"versions": {json.dumps(versions())},\n"records": [\n{rows}\n]}}\n')


def table(records: Iterable[Record]) -> str:
    """The page of results, in Markdown: a row for all seeds of a model on so many ranks."""
    said = ", ".join(f"{name} {version}" for name, version in versions().items())
    lines = [
        "# Parity with `transformers`",
        "",
        f"Made by `scripts/parity` from [parity.json](parity.json): {said}, float32 on a CPU.",
        "Small random models written by transformers, read by `moejax.families`; the configurations are in",
        f"`tests/moejax/families/published.py`. A prompt of {PROMPT} tokens, then {DECODED} greedy ones, through the",
        "paged step in one of these ways:",
        "",
        *(f"- {way}: {how}." for way, how in HOW.items()),
        "",
        "Differences of logits are the largest over all seeds and positions, over the largest logit; at most",
        f"{TOLERANCE:g} is asked for. A server tells log-probabilities, which are logits up to a constant: those of",
        "the tokens that came, and of the 20 likeliest in their place.",
        "",
        "| model | family | way | ranks | seeds | prefill | decode | greedy tokens equal |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for (model, way, ranks), group in _groups(records):
        prefill, later = max(c.prefill for c in group), max(c.decode for c in group)
        equal, all_of = sum(c.tokens for c in group), DECODED * len(group)
        family = CASES[model].rewrite.get("model_type", CASES[model].model_type)
        lines.append(
            f"| {model} | {family} | {way} | {ranks} | {len(group)} | {prefill:.1e} | {later:.1e} | {equal}/{all_of} |"
        )
    return "\n".join(lines) + "\n"


def _groups(records: Iterable[Record]) -> Iterator[tuple[tuple[str, str, int], list[Comparison]]]:
    groups: dict[tuple[str, str, int], list[Comparison]] = {}
    for record in records:
        groups.setdefault((record.model, record.way, record.ranks), []).append(record.found)
    yield from groups.items()


def compared(name: str, way: str, ranks: int, seed: int) -> Iterator[Record]:
    """Compare one model in one way."""
    case = CASES[name]
    if way == PROGRAMS:
        yield Record(model=name, way=way, ranks=ranks, seed=seed, found=compare(case, seed, ranks))
        return
    for told, found in zip((SERVER, KILLED), compare_served(case, seed, ranks), strict=True):
        yield Record(model=name, way=told, ranks=ranks, seed=seed, found=found)


def main() -> int:
    """Compare what the command line says; the exit status is 1 if any differs."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES), metavar="MODEL")
    parser.add_argument("--way", choices=(PROGRAMS, SERVER), help="default: both; a server is killed as well")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 4], help="a server needs 2 to lose one")
    parser.add_argument("--seeds", type=int, default=3, help="of the programs; a server is asked with one")
    parser.add_argument("--missing", action="store_true", help="only what parity.json has not")
    given = parser.parse_args()
    with contextlib.suppress(kernels.KernelError):
        kernels.load()
    path = RESULTS / "parity.json"
    kept, good = load(path), True
    for name, way, ranks, seed in plans(given):
        if given.missing and any((r.model, r.way, r.ranks, r.seed) == (name, way, ranks, seed) for r in kept.values()):
            continue
        for record in compared(name, way, ranks, seed):
            kept[record.key] = record
            good &= record.found.holds
            print(*dataclasses.astuple(record), sep="  ", flush=True)
        save(path, (kept[key] for key in sorted(kept)))
    (RESULTS / "parity.md").write_text(table(kept[key] for key in sorted(kept)))
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
