"""Measures a server of one rank for a model in each form in which models are published: memory and time to be ready.

    python -m benchmarks.forms [--gib 2] [--only awq mxfp4] [--folder WHERE] [--json FILE]

The same Mixtral of random weights, `--gib` GiB in bfloat16, is written once in each form and kept in the cache
(`--folder`: elsewhere). For each form a server is started twice with `--data-type published`, alone: the first start
converts the folder, or takes its checksums, and compiles; the second finds all that. Peak memory is the high-water mark
of the rank's process (VmHWM) after its first token, less that of a rank of `tiny`, and over the bytes of the weights as
they are published. Ready is when the server says so.
"""

import argparse
import json
import re
import shutil
from pathlib import Path
from typing import Any

from benchmarks.form_folders import FORMS, GGUF, write_form
from benchmarks.launch import launched
from benchmarks.machine import machine
from moejax.checkpoint.download import cache_folder
from serving.api.client import Client

OPTIONS = ("--data-type", "published", "--buckets", "2,0;2,2", "--pages-per-rank", "16")
BASE = "tiny"
"""The model whose rank has no weights to speak of."""
Values = dict[str, Any]


def high_water_of(pid: int) -> int:
    """The peak memory of a process, in bytes."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    assert found is not None, "Linux has it"
    return int(found[1]) << 10


def serve(model: str, cache: Path | None) -> Values:
    """Start a server, ask for a token, and read off what is measured."""
    with launched(model, 1, cache=cache, options=OPTIONS) as server, Client(server.address) as client:
        status = client.status()
        (rank,) = status.ranks
        assert rank.pid is not None, "it serves"
        return {
            "ready_s": server.ready_s,
            "first_token_s": server.first_token_s,
            "peak_bytes": high_water_of(rank.pid),
            "compiles_after_ready": status.compiles_after_ready,
            "said": [line for line in server.output().splitlines() if "ranks hold its weights in" in line],
        }


def measure(form: str, place: Path, gib: float) -> Values:
    """One form: its folder, made unless it is there, and both starts with a cache of their own."""
    model = place / f"{form.replace(' ', '-')}-{gib:g}{'.gguf' if form == GGUF else ''}"
    note = place / f"{model.name}.bytes"
    if not note.is_file():
        shutil.rmtree(model, ignore_errors=True)
        note.write_text(str(write_form(model, form, gib)))
    cache = place / "cache"
    shutil.rmtree(cache, ignore_errors=True)
    try:
        first, again = serve(str(model), cache), serve(str(model), cache)
    finally:
        shutil.rmtree(cache, ignore_errors=True)
    return {"form": form, "weights_bytes": int(note.read_text()), "first": first, "again": again}


def row(found: Values, base: int) -> str:
    """A row of the table of results."""
    gib, published = 2**30, found["weights_bytes"]
    peaks = [found[start]["peak_bytes"] - base for start in ("first", "again")]
    held = re.search(r"ranks hold its weights in (\S+),", " ".join(found["again"]["said"]))
    return (
        f"| {found['form']} | {held[1] if held else 'as published'} | {published / gib:.2f} GiB | "
        f"{peaks[0] / gib:.2f} / {peaks[1] / gib:.2f} GiB | {peaks[1] / published:.2f} | "
        f"{found['first']['ready_s']:.0f} / {found['again']['ready_s']:.1f} s |"
    )


def main() -> None:
    """Measure what the command line says, and print a row for each form."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--gib", type=float, default=2.0, help="size of the weights in bfloat16 (default: 2)")
    parser.add_argument("--only", nargs="+", choices=(*FORMS, GGUF), default=[*FORMS, GGUF], metavar="FORM")
    parser.add_argument("--folder", type=Path, default=cache_folder() / "benchmarks" / "forms", metavar="WHERE")
    parser.add_argument("--json", type=Path, metavar="FILE")
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    serve(BASE, None)  # compiles, in more memory than it takes afterwards
    base = serve(BASE, None)["peak_bytes"]
    result: Values = {"machine": machine(), "gib": given.gib, "base_bytes": base, "forms": []}
    print(f"a rank of {BASE} has {base / 2**30:.2f} GiB\n")
    print("| form | held in | published | peak of the rank, first / next start | over published | ready |")
    print("|---|---|---|---|---|---|")
    for form in given.only:
        found = measure(form, given.folder, given.gib)
        result["forms"].append(found)
        print(row(found, base), flush=True)
    if given.json:
        given.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
