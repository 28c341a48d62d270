"""Compiled kernels for a CPU, behind the same functions as their JAX references.

`load()` once per process, before anything is traced. From then on `active()` is true, and `moejax.layers`,
`moejax.experts` and `moejax.attention` call the kernels. Before, or where it raises KernelError, the references run.
Both keep the law that rows do not depend on their batch; their results differ in rounding.
"""

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from moejax.precision import Int8

SOURCES = tuple(Path(__file__).with_name(name) for name in ("cpu.cc", "shared.cc", "spread.h"))
CALLS = ("row_dot", "experts", "paged_attention", "likeliest", "drawn", "exchange")
TARGETS = tuple(f"moejax_{call}" for call in CALLS)
FLAGS = ("-std=c++17", "-O3", "-march=native", "-ffp-contract=off", "-fno-math-errno", "-fPIC", "-shared")

_library: ctypes.CDLL | None = None


class KernelError(RuntimeError):
    """The kernels cannot be built here; says what is missing and what happens then."""


def active() -> bool:
    """True once the kernels of this process are loaded."""
    return _library is not None


@contextlib.contextmanager
def set_aside() -> Iterator[None]:
    """While it lasts, programs are traced by the references, as if the kernels were not loaded."""
    global _library
    loaded, _library = _library, None
    jax.clear_caches()
    try:
        yield
    finally:
        _library = loaded
        jax.clear_caches()


def library() -> ctypes.CDLL:
    """The kernels of this process; `load` comes first."""
    assert _library is not None, "kernels.load() comes first"
    return _library


def build(folder: Path | None = None) -> Path:
    """The shared library, compiled with the C++ compiler of this machine unless it is in the cache. Raises
    KernelError."""
    folder = folder or Path(os.environ.get("MOEJAX_CACHE", Path.home() / ".cache/moejax")) / "kernels"
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise KernelError("no C++ compiler (g++ or clang++) is on the path, so JAX's own slower code is used.")
    library = folder / f"cpu-{_digest(compiler)}.so"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    state, me = folder.stat(), os.getuid()
    if state.st_uid != me or state.st_mode & 0o022 or (library.is_file() and library.stat().st_uid != me):
        raise KernelError(
            f"{folder} or what is in it belongs to another user than {me}, or others can write there (mode "
            f"{state.st_mode & 0o777:o}); it holds code, so JAX's own slower code is used. Remove it."
        )
    if not library.is_file():
        part = library.with_suffix(f".{os.getpid()}.part")
        command = [
            compiler,
            *FLAGS,
            "-w",
            f"-I{jax.ffi.include_dir()}",
            *(str(each) for each in SOURCES if each.suffix == ".cc"),
            "-o",
            str(part),
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise KernelError(f"{' '.join(command)} failed, so JAX's own slower code is used: {done.stderr[-2000:]}")
        part.rename(library)
    return library


def load(folder: Path | None = None) -> None:
    """Build what is missing and give the kernels to JAX. Raises KernelError."""
    global _library
    if _library is None:
        library = ctypes.CDLL(str(build(folder)), use_errno=True)
        for target in TARGETS:
            jax.ffi.register_ffi_target(target, jax.ffi.pycapsule(getattr(library, target)), platform="cpu")
        _library = library


def row_dot(x_TD: jax.Array, stack: jax.Array | Int8, index: tuple[jax.Array | int, ...]) -> jax.Array:
    """`x @ stack[index].T` `[T, F]` in float32, for a stack `[..., F, D]` of float32, bfloat16 or Int8. Differentiable
    unless Int8."""
    if isinstance(stack, Int8):
        return _row_dot_by(x_TD, *_parts(stack), _indices(index))
    return _row_dot(x_TD.astype(jnp.float32), stack, _indices(index))


@jax.custom_vjp
def _row_dot(x_TD: jax.Array, stack: jax.Array, index: jax.Array) -> jax.Array:
    return _row_dot_by(x_TD, *_parts(stack), index)


def _row_dot_by(x_TD: jax.Array, stack: jax.Array, scale: jax.Array, index: jax.Array) -> jax.Array:
    out = jax.ShapeDtypeStruct((x_TD.shape[0], stack.shape[-2]), jnp.float32)
    return jax.ffi.ffi_call("moejax_row_dot", out)(x_TD.astype(jnp.float32), stack, scale, index)


def _row_dot_forward(x_TD, stack, index):
    return _row_dot(x_TD, stack, index), (x_TD, stack, index)


def _row_dot_backward(kept, g_TF):
    x_TD, stack, index = kept
    at = tuple(index)
    return g_TF @ stack[at], jnp.zeros_like(stack).at[at].add((g_TF.T @ x_TD).astype(stack.dtype)), None


_row_dot.defvjp(_row_dot_forward, _row_dot_backward)


def experts(
    rows_rD: jax.Array, wanted_rA: jax.Array, gate_up: jax.Array | Int8, down: jax.Array | Int8, layer: jax.Array
) -> jax.Array:
    """Answers `[r, A, D]` of the slots wanted (-1: zeros) of one layer of `[R, S, 2F, D]` and `[R, S, D, F]`."""
    out = jax.ShapeDtypeStruct((*wanted_rA.shape, rows_rD.shape[1]), jnp.float32)
    return jax.ffi.ffi_call("moejax_experts", out)(
        rows_rD.astype(jnp.float32), wanted_rA, *_parts(gate_up), *_parts(down), _indices((layer,))
    )


def paged_attention(
    q_ZQNH, k_RKH, v_RKH, cache, layer, page_table_ZM, cached_Z, new_base_Z, positions_ZQ, page_size, *, scale
):
    """Outputs `[Z, Q, N, H]`; the arguments are those of `moejax.attention.paged_attention`."""
    return jax.ffi.ffi_call("moejax_paged_attention", jax.ShapeDtypeStruct(q_ZQNH.shape, jnp.float32))(
        *(q_ZQNH, k_RKH, v_RKH, cache.k, cache.v),
        *(_indices((layer,)), page_table_ZM, cached_Z, new_base_Z, positions_ZQ),
        page_size=int(page_size),
        scale=np.float32(scale),
    )


def likeliest(logits_ZV: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Of each row the first of the highest logits `[Z]`, and log(sum(exp(logits))) `[Z]`."""
    rows = logits_ZV.shape[:1]
    outs = (jax.ShapeDtypeStruct(rows, jnp.int32), jax.ShapeDtypeStruct(rows, jnp.float32))
    return tuple(jax.ffi.ffi_call("moejax_likeliest", outs)(logits_ZV.astype(jnp.float32)))


def drawn(logits_ZV: jax.Array, temperature_Z: jax.Array, keys_Z2: jax.Array) -> jax.Array:
    """Tokens `[Z]` drawn by the noise of each row's key, given as uint32; 0 for rows of temperature 0."""
    out = jax.ShapeDtypeStruct(logits_ZV.shape[:1], jnp.int32)
    return jax.ffi.ffi_call("moejax_drawn", out)(logits_ZV, temperature_Z, keys_Z2)


def exchange(x: jax.Array) -> jax.Array:
    """`all_to_all` of the equal parts of the first axis, over the arena in use (`moejax.shared`)."""
    return jax.ffi.ffi_call("moejax_exchange", jax.ShapeDtypeStruct(x.shape, x.dtype), has_side_effect=True)(x)


@functools.cache
def fingerprint() -> str:
    """Changes with everything compiled code that calls the kernels depends on; empty while they are not active."""
    sources = (*SOURCES, Path(__file__))
    return hashlib.sha256(b"".join(each.read_bytes() for each in sources)).hexdigest() if active() else ""


def _parts(weight: jax.Array | Int8) -> tuple[jax.Array, jax.Array]:
    """A weight's numbers and their scale; an empty one if there is none."""
    if isinstance(weight, Int8):
        return weight.numbers, weight.scale
    return weight, jnp.zeros((0,), jnp.float32)


def _indices(index: tuple[jax.Array | int, ...]) -> jax.Array:
    return jnp.array(index, jnp.int32).reshape(len(index))


def _digest(compiler: str) -> str:
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout
    cpu = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags")), "")
    about = (*(each.read_text() for each in SOURCES), *FLAGS, version, jax.__version__, platform.machine(), cpu)
    return hashlib.sha256("\0".join(about).encode()).hexdigest()[:24]
