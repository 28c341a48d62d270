"""The weights of a published model folder: safetensors in one file or several with an index, read range by range.

Only the bytes asked for are read, into an array of their own: no file is mapped, so memory is that of one tensor.
Two quantised forms are dequantised when they are read:

| form | in the file | comes out as bfloat16 |
|---|---|---|
| block-scaled float8 (DeepSeek-V3, arXiv 2412.19437, 3.3.2) | `X`, and `X_scale_inv` per 128 x 128 block | `X` |
| MXFP4 (OCP Microscaling 1.0; gpt-oss) | `X_blocks`, 16 bytes of 32 numbers; `X_scales` | `X [E, in, out]` |
"""

import dataclasses
import json
import math
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from moejax.checkpoint.manifest import CheckpointError

INDEX = "model.safetensors.index.json"
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": BFLOAT16,
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "I32": np.dtype(np.int32),
    "I64": np.dtype(np.int64),
    "BOOL": np.dtype(np.bool_),
}
"""Number formats by their names in safetensors."""
FLOATS = frozenset({"F64", "F32", "F16", "BF16"})
FP4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
"""The sixteen numbers of FP4 E2M1."""
_BIAS = 127  # of the shared exponents, E8M0


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """Where one tensor lies: its file, its form there, and the bytes from `start`."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int


class SafetensorsFolder:
    """The tensors of a folder, by name. `block` is the size of the scaled blocks of float8 weights."""

    def __init__(self, folder: Path, stored: dict[str, StoredTensor], block: tuple[int, int] = (128, 128)) -> None:
        self.folder = folder
        self._stored = stored
        self._block = block

    @classmethod
    def open(cls, folder: Path) -> "SafetensorsFolder":
        """Read the headers of all files. Raises CheckpointError naming the file that is missing or cut short."""
        folder = Path(folder)
        stored: dict[str, StoredTensor] = {}
        for file in _files(folder):
            for name, each in _header(file).items():
                if name in stored:
                    raise CheckpointError(f"tensor {name} is in {stored[name].file} and in {file}; one must go.")
                stored[name] = each
        return cls(folder, stored, _block_size(folder))

    @property
    def bytes(self) -> int:
        """Bytes of all tensors as stored."""
        return sum(math.prod(s.shape) * DTYPES[s.dtype].itemsize for s in self._stored.values())

    def __contains__(self, name: str) -> bool:
        return name in self._stored or f"{name}_blocks" in self._stored

    def names(self) -> set[str]:
        """All tensors, quantised ones once, by the name of the numbers they stand for."""
        scales = {f"{n}_scale_inv" for n in self._stored} | {f"{n[: -len('_blocks')]}_scales" for n in self._mxfp4()}
        plain = {n.removesuffix("_blocks") if n in self._mxfp4() else n for n in self._stored}
        return plain - (scales & self._stored.keys())

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, after widening."""
        if name in self._stored:
            return self._stored[name].shape
        *lead, rows, groups, half = self._stored[f"{name}_blocks"].shape
        return (*lead, groups * half * 2, rows)

    def dtype(self, name: str) -> np.dtype:
        """Number format of a tensor, after widening. Raises CheckpointError for one that is not known."""
        if name not in self._stored:
            return BFLOAT16
        stored = self._stored[name]
        if stored.dtype in FLOATS:
            return DTYPES[stored.dtype]
        if stored.dtype.startswith("F8"):
            return BFLOAT16
        raise CheckpointError(
            f"{stored.file}: tensor {name} has numbers of {stored.dtype}; "
            f"known are {', '.join(sorted(FLOATS))}, block-scaled F8 and MXFP4."
        )

    def file(self, name: str) -> Path:
        """The file a tensor is in."""
        return (self._stored.get(name) or self._stored[f"{name}_blocks"]).file

    def read(self, name: str, index: int | None = None) -> np.ndarray:
        """A tensor, or one index of its first axis: only those bytes. Raises CheckpointError naming the file."""
        if name not in self._stored:
            blocks, scales = self._numbers(f"{name}_blocks", index), self._numbers(f"{name}_scales", index)
            return dequantize_mxfp4(blocks, scales).swapaxes(-1, -2)
        array = self._numbers(name, index)
        if array.dtype.itemsize > 1:
            return array
        scale = self._numbers(self._scale(name), index)
        return dequantize_fp8_blocks(array, scale, self._block)

    def check_tensor(self, name: str, shape: tuple[int, ...], purpose: str) -> None:
        """Raise CheckpointError unless the tensor is there in this shape, and whole. `purpose` is what it is for."""
        if name not in self:
            raise CheckpointError(
                f"{self.folder}: tensor {name} of shape {shape} is missing (it makes {purpose}); the folder's "
                f"{len({s.file for s in self._stored.values()})} files hold {len(self._stored)} other tensors."
            )
        found = self.shape(name)
        if found != shape:
            raise CheckpointError(
                f"{self.file(name)}: tensor {name} has shape {found}, but config.json says {shape} "
                f"(it makes {purpose}). The two belong to different models."
            )
        self.dtype(name)
        if name not in self._stored:
            self._check_part(f"{name}_scales", self._stored[f"{name}_blocks"].shape[:-1])
        elif self._stored[name].dtype.startswith("F8"):
            *lead, rows, width = shape
            blocks = (*lead, -(-rows // self._block[0]), -(-width // self._block[1]))
            self._check_part(self._scale(name), blocks)

    def _check_part(self, name: str, shape: tuple[int, ...]) -> None:
        stored = self._stored.get(name)
        if stored is None:
            raise CheckpointError(
                f"{self.folder}: tensor {name} of shape {shape}, the scales of a quantised one, is missing."
            )
        if stored.shape != shape:
            raise CheckpointError(f"{stored.file}: tensor {name} has shape {stored.shape}; the weights need {shape}.")

    def _mxfp4(self) -> set[str]:
        return {n for n in self._stored if n.endswith("_blocks") and f"{n[: -len('_blocks')]}_scales" in self._stored}

    @staticmethod
    def _scale(name: str) -> str:
        return f"{name}_scale_inv"

    def _numbers(self, name: str, index: int | None) -> np.ndarray:
        stored = self._stored[name]
        shape, dtype, start = stored.shape, DTYPES[stored.dtype], stored.start
        if index is not None:
            shape = shape[1:]
            start += index * math.prod(shape) * dtype.itemsize
        wanted = math.prod(shape) * dtype.itemsize
        try:
            raw = np.fromfile(stored.file, np.uint8, count=wanted, offset=start)
        except OSError as error:
            raise CheckpointError(f"{stored.file} cannot be read: {error}.") from error
        if raw.size != wanted:
            raise CheckpointError(
                f"{stored.file} ends within tensor {name}: {raw.size} of its {wanted} bytes are there. Fetch it again."
            )
        return raw.view(dtype).reshape(shape)


def dequantize_fp8_blocks(weight: np.ndarray, scale: np.ndarray, block: tuple[int, int]) -> np.ndarray:
    """float8 `[..., out, in]` times the scale of each block `[..., out / block, in / block]`, as bfloat16."""
    rows, width = weight.shape[-2:]
    spread = np.repeat(np.repeat(scale.astype(np.float32), block[0], axis=-2), block[1], axis=-1)
    return (weight.astype(np.float32) * spread[..., :rows, :width]).astype(BFLOAT16)


def dequantize_mxfp4(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """MXFP4 `[..., out, in / 32, 16]` (two numbers a byte, the lower half first) and the exponents
    `[..., out, in / 32]`, as bfloat16 `[..., out, in]`: exact, as each has three significant bits at most."""
    *lead, groups, half = blocks.shape
    numbers = np.empty((*lead, groups, half, 2), np.float32)
    numbers[..., 0] = FP4[blocks & 0x0F]
    numbers[..., 1] = FP4[blocks >> 4]
    exponents = scales.astype(np.int32)[..., None, None] - _BIAS
    return np.ldexp(numbers, exponents).astype(BFLOAT16).reshape(*lead, groups * half * 2)


def is_safetensors_folder(folder: Path) -> bool:
    """True for a folder that holds safetensors."""
    return (folder / INDEX).is_file() or any(folder.glob("*.safetensors"))


def _files(folder: Path) -> list[Path]:
    index = folder / INDEX
    if not index.is_file():
        single = folder / "model.safetensors"
        files = [single] if single.is_file() else sorted(folder.glob("*.safetensors"))
        if not files:
            raise CheckpointError(f"{folder} holds no safetensors.")
        # A second copy of the weights in the form of the model's authors, under other names, as Mistral publishes it.
        return [file for file in files if not file.name.startswith("consolidated")] or files
    try:
        files = sorted({folder / name for name in json.loads(index.read_text("utf-8-sig"))["weight_map"].values()})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} cannot be read: {type(error).__name__}: {error}.") from error
    for file in files:
        if not file.is_file():
            raise CheckpointError(f"{file} is missing; {index.name} lists {len(files)} files. Fetch it again.")
    return files


def _header(file: Path) -> dict[str, StoredTensor]:
    """The tensors of one file. The library checks that the header is sound and the file is as long as it says."""
    try:
        with safe_open(file, framework="numpy") as checked:
            names = list(checked.keys())
        with file.open("rb") as opened:
            size = int.from_bytes(opened.read(8), "little")
            header = json.loads(opened.read(size))
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{file} is no whole safetensors file ({error}). Fetch it again.") from error
    stored = {}
    for name in names:
        entry = header[name]
        if entry["dtype"] not in DTYPES:
            raise CheckpointError(
                f"{file}: tensor {name} has numbers of {entry['dtype']}; known are {', '.join(DTYPES)}."
            )
        stored[name] = StoredTensor(file, entry["dtype"], tuple(entry["shape"]), 8 + size + entry["data_offsets"][0])
    return stored


def _block_size(folder: Path) -> tuple[int, int]:
    try:
        values = json.loads((folder / "config.json").read_text("utf-8-sig"))
        rows, width = (values.get("quantization_config") or {}).get("weight_block_size") or (128, 128)
    except (OSError, ValueError, TypeError, AttributeError):
        return 128, 128  # read_config says what is wrong with config.json
    return int(rows), int(width)
