"""Compiled kernels for a CPU, behind the same functions as their JAX references.

`load()` once per process, before anything is traced. From then on `active()` is true, and `moejax.model.layers`,
`moejax.model.experts`, `moejax.model.attention` and `moejax.model.delta_net` call the kernels. Before, or where it
raises KernelError, the references run. Both keep the law that rows do not depend on their batch; their results differ
in rounding.
"""

import contextlib
import ctypes
import fcntl
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
from jaxtyping import Float, Int, Shaped, UInt32

from moejax.config.attention_inputs import AttentionInputs
from moejax.config.axes import ArrayLike
from moejax.config.delta_inputs import DeltaInputs
from moejax.config.eight_bit import EightBit
from moejax.config.int4 import Int4
from moejax.config.kv_cache import Scaled
from moejax.config.weight_formats import Quantized, is_scaled
from planner.inputs.routed_experts import Activation

SOURCES = tuple(
    Path(__file__).with_name(name) for name in ("cpu.cc", "delta.cc", "eight_bit.h", "int4.h", "shared.cc", "spread.h")
)
CALLS = ("row_dot", "experts", "paged_attention", "delta_rule", "likeliest", "drawn", "exchange")
TARGETS = tuple(f"moejax_{call}" for call in CALLS)
ACTIVATIONS: dict[Activation, int] = {"relu2": 0, "swiglu": 1, "geglu": 2}
"""The numbers that `cpu.cc` has for what is between the two matrices of an expert."""
FLAGS = ("-std=c++17", "-O3", "-march=native", "-ffp-contract=off", "-fno-math-errno", "-fPIC", "-shared")

_library: ctypes.CDLL | None = None


class KernelError(RuntimeError):
    """The kernels cannot be built on this machine. The message says what is missing and what is used instead."""


def active() -> bool:
    """True once the kernels of this process are loaded."""
    return _library is not None


@contextlib.contextmanager
def disabled() -> Iterator[None]:
    """A context in which programs are traced with the references, as if the kernels were not loaded."""
    global _library
    loaded, _library = _library, None
    jax.clear_caches()
    try:
        yield
    finally:
        _library = loaded
        jax.clear_caches()


def library() -> ctypes.CDLL:
    """The shared library of the kernels; call `load` first."""
    assert _library is not None, "moejax.ops.cpu.load() comes first"
    return _library


def build(folder: Path | None = None) -> Path:
    """Compile the shared library with the C++ compiler of this machine, unless the cache has it; returns its path.
    Raises KernelError."""
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
        with open(library.with_suffix(".lock"), "w") as lock:
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(lock, fcntl.LOCK_EX)  # of the processes that start at once, one builds
            if not library.is_file():
                _build(compiler, library)
    return library


def _build(compiler: str, library: Path) -> None:
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


def load(folder: Path | None = None) -> None:
    """Build the kernels if necessary and register them with JAX. Raises KernelError."""
    global _library
    if _library is None:
        library = ctypes.CDLL(str(build(folder)), use_errno=True)
        for target in TARGETS:
            jax.ffi.register_ffi_target(target, jax.ffi.pycapsule(getattr(library, target)), platform="cpu")
        _library = library


def row_dot(
    x_TD: Float[ArrayLike, "T D"], stack: ArrayLike | Quantized, index: tuple[ArrayLike | int, ...]
) -> Float[jax.Array, "T F"]:
    """`x @ stack[index].T` `[T, F]` in float32, for a stack `[..., F, D]` of float32, bfloat16, or
    `Quantized`. Differentiable unless that."""
    if is_scaled(stack):
        return _row_dot_by(x_TD, stack, _indices(index))
    return _row_dot(x_TD.astype(jnp.float32), stack, _indices(index))


@jax.custom_vjp
def _row_dot(x_TD: Float[ArrayLike, "T D"], stack: ArrayLike, index: ArrayLike) -> jax.Array:
    return _row_dot_by(x_TD, stack, index)


def _row_dot_by(x_TD: Float[ArrayLike, "T D"], stack: ArrayLike | Quantized, index: ArrayLike) -> jax.Array:
    parts = _parts(stack)
    out = jax.ShapeDtypeStruct((x_TD.shape[0], parts[0].shape[-2]), jnp.float32)
    call = jax.ffi.ffi_call("moejax_row_dot", out)
    return call(x_TD.astype(jnp.float32), *parts, index, group=_group(stack), rows=_rows_of_a_scale(stack))


def _row_dot_forward(x_TD, stack, index):
    return _row_dot(x_TD, stack, index), (x_TD, stack, index)


def _row_dot_backward(kept, g_TF):
    x_TD, stack, index = kept
    at = tuple(index)
    return g_TF @ stack[at], jnp.zeros_like(stack).at[at].add((g_TF.T @ x_TD).astype(stack.dtype)), None


_row_dot.defvjp(_row_dot_forward, _row_dot_backward)


def experts(
    rows_rD: Float[ArrayLike, "r D"],
    wanted_rA: Int[ArrayLike, "r A"],
    gate_up: ArrayLike | Quantized,
    down: ArrayLike | Quantized,
    layer: ArrayLike | int,
    activation: Activation = "swiglu",
) -> Float[jax.Array, "r A D"]:
    """Answers `[r, A, D]` of the slots wanted (-1: zeros) of one layer of `[R, S, 2F, D]` (without a gate `[R, S, F,
    D]`) and `[R, S, D, F]`."""
    out = jax.ShapeDtypeStruct((*wanted_rA.shape, rows_rD.shape[1]), jnp.float32)
    return jax.ffi.ffi_call("moejax_experts", out)(
        *(rows_rD.astype(jnp.float32), wanted_rA, *_parts(gate_up), *_parts(down), _indices((layer,))),
        gate_up_group=_group(gate_up),
        down_group=_group(down),
        gate_up_rows=_rows_of_a_scale(gate_up),
        down_rows=_rows_of_a_scale(down),
        activation=ACTIVATIONS[activation],
    )


def paged_attention(inputs: AttentionInputs) -> Float[jax.Array, "Z Q N H"]:
    """Attention of plain inputs (`AttentionInputs.is_plain`), float32, over a cache of any format."""
    new, cache = inputs.new, inputs.cache
    return jax.ffi.ffi_call("moejax_paged_attention", jax.ShapeDtypeStruct(inputs.q.shape, jnp.float32))(
        *(inputs.q, *(part for rows in (new.k, new.v, cache.k, cache.v) for part in _rows(rows))),
        *(_indices((inputs.layer,)), inputs.page_table, inputs.cached, inputs.new_base, inputs.positions),
        kv_heads=int(inputs.kv_heads),
        page_size=int(inputs.page_size),
        scale=np.float32(inputs.scale),
    )


def delta_rule(inputs: DeltaInputs) -> tuple[Float[jax.Array, "R V Dv"], Float[jax.Array, "Z V Dk Dv"]]:
    """Outputs of all rows of the gated delta rule or its kin, and the states of all segments after their rows."""
    segments = inputs.source.shape
    outs = (
        jax.ShapeDtypeStruct(inputs.v.shape, jnp.float32),
        jax.ShapeDtypeStruct((*segments, *inputs.states.shape[2:]), jnp.float32),
    )
    outputs, states = jax.ffi.ffi_call("moejax_delta_rule", outs)(
        *(inputs.q, inputs.k, inputs.v, inputs.decay, inputs.rate, inputs.states),
        *(_indices((inputs.layer,)), inputs.source.astype(jnp.int32)),
        decode=int(inputs.decode),
        corrects=int(inputs.corrects),
    )
    return outputs, states


def likeliest(logits_ZV: Float[ArrayLike, "Z V"]) -> tuple[Int[jax.Array, " Z"], Float[jax.Array, " Z"]]:
    """The first of the highest logits of each row, and log(sum(exp(logits)))."""
    rows = logits_ZV.shape[:1]
    outs = (jax.ShapeDtypeStruct(rows, jnp.int32), jax.ShapeDtypeStruct(rows, jnp.float32))
    token_Z, normalizer_Z = jax.ffi.ffi_call("moejax_likeliest", outs)(logits_ZV.astype(jnp.float32))
    return token_Z, normalizer_Z


def draw_tokens(
    logits_ZV: Float[ArrayLike, "Z V"], temperature_Z: Float[ArrayLike, " Z"], keys_Z2: UInt32[ArrayLike, "Z 2"]
) -> Int[jax.Array, " Z"]:
    """Tokens drawn with the noise of each row's key, given as uint32; 0 for rows of temperature 0."""
    out = jax.ShapeDtypeStruct(logits_ZV.shape[:1], jnp.int32)
    return jax.ffi.ffi_call("moejax_drawn", out)(logits_ZV, temperature_Z, keys_Z2)


def exchange(x: Shaped[ArrayLike, "n ..."]) -> Shaped[jax.Array, "n ..."]:
    """`all_to_all` of the equal parts of the first axis, over the arena in use (`moejax.model.shared_memory`)."""
    return jax.ffi.ffi_call("moejax_exchange", jax.ShapeDtypeStruct(x.shape, x.dtype), has_side_effect=True)(x)


@functools.cache
def fingerprint() -> str:
    """A digest of the kernels' sources, for the names of executables that call them; empty while they are not
    active."""
    return _sources_digest() if active() else ""


@functools.cache
def _sources_digest() -> str:
    sources = (*SOURCES, Path(__file__))
    return hashlib.sha256(b"".join(each.read_bytes() for each in sources)).hexdigest()


def _parts(weight: ArrayLike | Quantized) -> tuple[ArrayLike, ArrayLike, ArrayLike]:
    """A weight's numbers, its scale, and zero points, or the factors of NVFP4, each empty unless there are some."""
    none = jnp.zeros((0,), jnp.float32)
    if not isinstance(weight, Quantized):
        return weight, none, none
    more = weight.more if isinstance(weight, Int4) else weight.zero if isinstance(weight, EightBit) else None
    return weight.numbers, weight.scale, none if more is None else more


def _group(weight: ArrayLike | Quantized) -> int:
    """Columns of a weight that share a scale, where these are those of groups."""
    if isinstance(weight, EightBit):
        return weight.group or weight.numbers.shape[-1]
    return weight.group if isinstance(weight, Int4) else 0


def _rows_of_a_scale(weight: ArrayLike | Quantized) -> int:
    """Rows of a weight that share a scale."""
    return weight.rows if isinstance(weight, EightBit) else 1


def _rows(rows: ArrayLike | Scaled) -> tuple[ArrayLike, ArrayLike]:
    """The numbers of keys or values and their scales, which are empty unless the cache has some."""
    return (rows.numbers, rows.scale) if isinstance(rows, Scaled) else (rows, jnp.zeros((0,), jnp.float32))


def _indices(index: tuple[ArrayLike | int, ...]) -> jax.Array:
    return jnp.array(index, jnp.int32).reshape(len(index))


def _digest(compiler: str) -> str:
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout
    cpu = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags")), "")
    about = (*(each.read_text() for each in SOURCES), *FLAGS, version, jax.__version__, platform.machine(), cpu)
    return hashlib.sha256("\0".join(about).encode()).hexdigest()[:24]
