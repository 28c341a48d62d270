"""Laws of stored executables: what a program is made of changes its name, and one process of a host compiles it."""

import concurrent.futures
import dataclasses
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from moejax.config.model_config import ModelConfig
from moejax.config.step_inputs import Bucket
from moejax.runtime.executables import ExecutableStore, compiled_sources
from moejax.runtime.programs import Lowering, ModelShape, compile_missing, load_program, local_lowerings
from tests.support.models import MIXTRAL

ROOT = Path(__file__).parents[3]
IMPORTED = """
import sys, moejax.runtime.steps, moejax.ops.pallas.gpu, moejax.ops.pallas.tpu
print(*(m.__file__ for name, m in sys.modules.items() if name.startswith("moejax") and m.__file__))
"""


def test_every_module_that_a_step_is_compiled_from_is_in_the_digest() -> None:
    done = subprocess.run([sys.executable, "-c", IMPORTED], capture_output=True, text=True, check=True, cwd=ROOT)
    imported = {Path(file) for file in done.stdout.split()}
    docstrings = {ROOT / "moejax" / "__init__.py", ROOT / "moejax" / "runtime" / "__init__.py"}
    assert ROOT / "moejax" / "model" / "decoder.py" in imported
    assert imported - set(compiled_sources()) <= docstrings


def local_names(cfg: ModelConfig) -> dict[str, set[str]]:
    """Names of the programs of a rank alone, by their kind."""
    bucket = Bucket(decode=2, tiles=1, max_pages=4)
    shape, names = ModelShape(cfg=cfg, buckets=(bucket,), page_size=32, pages=8), {}
    for name, _ in local_lowerings(shape, jax.devices()[0], slots=2):
        names.setdefault(name.rpartition("-")[0], set()).add(name)
    return names


def test_a_rank_alone_shares_programs_with_models_and_formats_that_have_their_shapes_in_common() -> None:
    names = local_names(MIXTRAL)
    assert names.keys() == {"sample", "sample-adjusted", "score", "commit", "fill"}

    def other(**changes: object) -> set[str]:
        changed = local_names(dataclasses.replace(MIXTRAL, **changes))
        return {kind for kind in names if names[kind] != changed[kind]}

    assert other(name="another", rope_base=5e5) == set()
    assert other(cache_format="int8") == {"commit"}
    assert other(vocab_size=128) == {"sample", "sample-adjusted", "score"}
    assert other(weights="int8") >= {"fill"}


HOLDER = """
import sys, time
from pathlib import Path
from moejax.runtime.executables import ExecutableStore
with ExecutableStore(Path(sys.argv[1])).claim("step", 0) as mine:
    print(mine, flush=True)
    time.sleep(600)
"""


def programs(number: int) -> list[Lowering]:
    row = jax.ShapeDtypeStruct((4,), jnp.float32)
    return [(f"program-{i}", lambda i=i: jax.jit(lambda x: x * i + 1).lower(row)) for i in range(number)]


def test_ranks_that_start_at_once_compile_each_program_once(tmp_path: Path) -> None:
    devices = jax.devices()[:1]

    def start(_: int) -> int:
        return compile_missing(ExecutableStore(tmp_path), iter(programs(8)), devices)

    with concurrent.futures.ThreadPoolExecutor(4) as ranks:
        assert sum(ranks.map(start, range(4))) == 8
    assert {path.name for path in tmp_path.iterdir()} == {f"program-{i}" for i in range(8)}
    x = jnp.arange(4, dtype=jnp.float32)
    for i, program in enumerate(programs(8)):
        np.testing.assert_array_equal(load_program(ExecutableStore(tmp_path), program, devices)(x), x * i + 1)


def test_a_program_whose_process_died_is_compiled_by_another(tmp_path: Path) -> None:
    store = ExecutableStore(tmp_path)
    with subprocess.Popen([sys.executable, "-c", HOLDER, tmp_path], stdout=subprocess.PIPE, cwd=ROOT) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"True\n"
        with store.claim("step", 0) as mine:
            assert not mine
        holder.kill()
    with store.claim("step", 60) as mine:
        assert mine
