"""Parameters, bytes and cache of every published configuration under a folder, by family.

    python -m benchmarks.published --configs FOLDER [--context 32768]

Every file named config.json, or ending in it, is read as `moejax plan` and `moejax serve` read it. For one that is not
read the reason is printed. `active` is what a token touches, as model cards count it; `bytes` are those of the weights
in the form that the configuration says, `cache` those of one request of `--context` tokens in bfloat16.
"""

import argparse
import collections
from collections.abc import Iterator
from pathlib import Path

from planner.errors import InputError
from planner.inputs.published import count_parameters, published_model, read_config_values, workload_of

Row = tuple[str, ...]
HEAD: Row = ("family", "model", "parameters", "active", "experts", "form", "bytes", "cache")


def configurations(folder: Path) -> list[Path]:
    """Every config.json under a folder, in order. Files that name them otherwise must end in `_config.json`."""
    others = ("tokenizer_config.json", "generation_config.json", "hf_quant_config.json", "preprocessor_config.json")
    return sorted(path for path in folder.rglob("*config.json") if not path.name.endswith(others))


def name_of(path: Path, folder: Path) -> str:
    """The name of a model: that of its folder, or of its file."""
    if path.name == "config.json":
        return path.parent.relative_to(folder).as_posix()
    return path.relative_to(folder).with_suffix("").as_posix()


def row_of(path: Path, folder: Path, context: int) -> Row:
    """The figures of one configuration. Raises InputError for one that is not read."""
    model = published_model(read_config_values(path), path.name)
    counts = count_parameters(model)
    experts = f"{counts.experts_per_token} of {counts.experts}" if counts.experts else ""
    try:
        workload = workload_of(model)
        held = workload.rest_bytes + workload.moe_layers * workload.experts * workload.expert_bytes
        sizes = (workload.weight_format, f"{held / 1e9:,.1f} GB", f"{workload.cache_bytes(context) / 2**20:,.0f} MiB")
    except InputError:
        sizes = ("not known", "", "")
    return (model.family, name_of(path, folder), f"{counts.total:,}", f"{counts.active:,}", experts, *sizes)


def report(folder: Path, context: int) -> str:
    """The table, families together, and after it the reasons why others are not read."""
    found, reasons = [], collections.defaultdict(list)
    for path in configurations(folder):
        try:
            found.append(row_of(path, folder, context))
        except InputError as error:
            reasons[str(error)].append(name_of(path, folder))
    table = [HEAD, *sorted(found)]
    widths = [max(len(row[i]) for row in table) for i in range(len(HEAD))]
    left = (0, 1, 4, 5)
    lines = [
        "  ".join(cell.ljust(width) if i in left else cell.rjust(width) for i, (cell, width) in _cells(row, widths))
        for row in table
    ]
    count = len(found) + sum(map(len, reasons.values()))
    lines += ["", f"{len(found)} of {count} configurations are read."]
    lines += [f"{', '.join(names)}: {reason}" for reason, names in sorted(reasons.items())]
    return "\n".join(line.rstrip() for line in lines)


def _cells(row: Row, widths: list[int]) -> Iterator[tuple[int, tuple[str, int]]]:
    return enumerate(zip(row, widths, strict=True))


def main(arguments: list[str] | None = None) -> int:
    """Print the report of a folder; the exit status is 1 if it has no configuration."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--configs", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--context", type=int, default=32_768, help="tokens of a request")
    given = parser.parse_args(arguments)
    if not configurations(given.configs):
        print(f"{given.configs} has no config.json.")
        return 1
    print(report(given.configs, given.context))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
