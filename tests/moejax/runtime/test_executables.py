"""Laws of stored executables: whatever a compiled program is made of changes their names."""

import subprocess
import sys
from pathlib import Path

from moejax.runtime.executables import compiled_sources

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
