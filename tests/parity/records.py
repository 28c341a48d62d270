"""The results of comparisons as JSON, and the page that is written from them."""

import dataclasses
import importlib.metadata
import json
from collections import Counter
from pathlib import Path
from typing import Any

from moejax.ops import cpu
from tests.parity.comparison import DECODED, PROMPT, TOLERANCE, Comparison
from tests.support.families.published import ALL

RESULTS = Path(__file__).parents[2] / "docs" / "results"
JSON, PAGE = RESULTS / "parity.json", RESULTS / "parity.md"
PROGRAMS, SERVER, KILLED = "programs", "server", "server, killed"
HOW = {
    PROGRAMS: "step programs over a mesh of devices within one process",
    SERVER: "a server with a process for each rank, called over gRPC",
    KILLED: "the same; SIGKILL to the rank that has the request, once a third of its tokens have arrived",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Record:
    """One comparison, by what was compared, and the version of transformers that it was compared with."""

    model: str
    way: str
    ranks: int
    seed: int
    found: Comparison
    transformers: str = dataclasses.field(default_factory=lambda: importlib.metadata.version("transformers"))

    @property
    def key(self) -> tuple[int, int, int, int]:
        """A key that is unique among the records, in the order of the table."""
        return list(ALL).index(self.model), list(HOW).index(self.way), self.ranks, self.seed


Records = dict[tuple[int, int, int, int], Record]


def load() -> Records:
    """The records of earlier runs, of models that there still are."""
    if not JSON.is_file():
        return {}
    rows = [row for row in json.loads(JSON.read_text())["records"] if row["model"] in ALL]
    fields = [field.name for field in dataclasses.fields(Record)]
    kept = ({name: row[name] for name in fields} for row in rows)
    records = [Record(**row | {"found": Comparison(**row["found"])}) for row in kept]
    return {record.key: record for record in records}


def save(records: Records) -> None:
    """Write the records, a line each, with the versions of what was compared, and the page."""
    versions = {name: importlib.metadata.version(name) for name in ("jax", "torch")}
    versions["with"] = "our CPU kernels" if cpu.active() else "XLA alone"
    rows = ",\n".join(json.dumps(_row(records[key])) for key in sorted(records))
    JSON.write_text(f'{{"versions": {json.dumps(versions)},\n"records": [\n{rows}\n]}}\n')
    PAGE.write_text(page())


def _row(record: Record) -> dict[str, Any]:
    """A record as JSON, and the family of its model."""
    return dataclasses.asdict(record) | {"family": ALL[record.model].family}


def page() -> str:
    """The page of results, in Markdown: a row for all seeds of a model on so many ranks."""
    records, versions = load(), json.loads(JSON.read_text())["versions"]
    counts = Counter(record.transformers for record in records.values())
    with_ = " and ".join(f"{version} ({count} records)" for version, count in sorted(counts.items()))
    said = ", ".join([f"transformers {with_}", *(f"{name} {version}" for name, version in versions.items())])
    lines = [
        "# Parity with `transformers`",
        "",
        f"Made by `scripts/parity` from [parity.json](parity.json): {said}, float32 on a CPU.",
        "Small random models written by transformers, read by `moejax.checkpoint.families`; the configurations are in",
        f"`tests/support/families/published.py`. A prompt of {PROMPT} tokens, then {DECODED} greedy ones, through the",
        "paged step, compared in these setups:",
        "",
        *(f"- {way}: {how}." for way, how in HOW.items()),
        "",
        "Differences of logits are the largest over all seeds and positions, over the largest logit; at most",
        f"{TOLERANCE:g} is allowed. A server returns log-probabilities, which are logits up to a constant: those of",
        "the sampled tokens, and of the 20 likeliest at their positions.",
        "",
        "| model | family | setup | ranks | seeds | prefill | decode | greedy tokens equal |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for (model, way, ranks), group in _groups(records).items():
        prefill, later = max(c.prefill for c in group), max(c.decode for c in group)
        equal, all_of = sum(c.tokens for c in group), DECODED * len(group)
        family = ALL[model].family
        lines.append(
            f"| {model} | {family} | {way} | {ranks} | {len(group)} | {prefill:.1e} | {later:.1e} | {equal}/{all_of} |"
        )
    return "\n".join(lines) + "\n"


def _groups(records: Records) -> dict[tuple[str, str, int], list[Comparison]]:
    groups: dict[tuple[str, str, int], list[Comparison]] = {}
    for key in sorted(records):
        record = records[key]
        groups.setdefault((record.model, record.way, record.ranks), []).append(record.found)
    return groups
