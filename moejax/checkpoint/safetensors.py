"""The weights of a published model folder: safetensors in one file or several with an index, read range by range.

Only the bytes asked for are read, into an array of their own: no file is mapped, so memory is that of one tensor.
Quantised matrices go by the names that they have without quantisation and are dequantised when they are read
(`moejax.checkpoint.quantized`).
"""

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from moejax.checkpoint.manifest import CheckpointError
from moejax.checkpoint.quantized import QuantizedTensor, StoredTensor, find_quantized
from moejax.checkpoint.quantized.detection import is_unused, parts_of
from moejax.config.int4 import Planes
from moejax.config.packed_form import PackedForm
from planner.errors import InputError
from planner.inputs.published.mistral_format import FILE, config_file
from planner.inputs.published.quantization import Quantization, Scheme, read_quantization
from planner.inputs.published.reader import decoder_fields, read_config_values

INDEX = "model.safetensors.index.json"
OWN_INDEX = "consolidated.safetensors.index.json"
"""Of Mistral's own format."""
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": BFLOAT16,
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "I32": np.dtype(np.int32),
    "I64": np.dtype(np.int64),
    "BOOL": np.dtype(np.bool_),
}
"""Number formats by their names in safetensors."""
FLOATS = frozenset({"F64", "F32", "F16", "BF16"})
PICKLED = ("*.bin", "*.pt", "*.pth")
READ = "float32, bfloat16, float16, FP8 and int8 with scales, MXFP4, NVFP4, and int4 (compressed-tensors, AWQ, GPTQ)"
"""The forms that are read, for errors."""


class SafetensorsFolder:
    """The tensors of a folder, by name: stored ones, and quantised ones by the name that they have otherwise."""

    def __init__(self, folder: Path, stored: dict[str, StoredTensor]) -> None:
        self.folder = folder
        self.config = config_file(folder).name
        """Name of the file that describes the model."""
        self._stored = stored
        scheme_of, wide = _quantization(folder)
        self._quantized: dict[str, QuantizedTensor] = find_quantized(stored, scheme_of, wide, self._numbers)
        self.unused = frozenset(name for name in stored if is_unused(name))
        """Names of scales of activations and of the KV cache."""
        self._parts = frozenset(parts_of(self._quantized, stored)) | self.unused

    @classmethod
    def open(cls, folder: Path) -> "SafetensorsFolder":
        """Read the headers of all files. Where there is an index, a tensor that several files have is that of the file
        which the index names. Raises CheckpointError naming the file that is missing or cut short, and for a
        quantisation that is not read."""
        folder = Path(folder)
        stored: dict[str, StoredTensor] = {}
        index = _index_file(folder)
        places = None if index is None else _places(index)
        files = _files(folder) if index is None or places is None else _indexed_files(index, places)
        for file in files:
            for name, each in _header(file).items():
                if places is not None and places.get(name, file.name) != file.name:
                    continue
                if name in stored:
                    raise CheckpointError(f"tensor {name} is in {stored[name].file} and in {file}; one must go.")
                stored[name] = each
        return cls(folder, stored)

    @property
    def stored(self) -> Mapping[str, StoredTensor]:
        """The tensors as they are in the files, by their names there."""
        return self._stored

    @property
    def bytes(self) -> int:
        """Bytes of all tensors as stored."""
        return sum(math.prod(s.shape) * DTYPES[s.dtype].itemsize for s in self._stored.values())

    def __contains__(self, name: str) -> bool:
        return name in self._quantized or (name in self._stored and name not in self._parts)

    def names(self) -> set[str]:
        """All tensors, quantised ones once, by the name of the numbers they stand for."""
        return (self._stored.keys() - self._parts) | self._quantized.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, after widening."""
        return self._quantized[name].shape if name in self._quantized else self._stored[name].shape

    def form(self, name: str) -> str:
        """The form of a tensor in its file: `bfloat16`, `fp8`, `mxfp4`."""
        return self._quantized[name].format if name in self._quantized else self.dtype(name).name

    def dtype(self, name: str) -> np.dtype:
        """Number format of a tensor, after widening. Raises CheckpointError for one that is not known."""
        if name in self._quantized:
            return self._quantized[name].dtype
        stored = self._stored[name]
        if stored.dtype in FLOATS:
            return DTYPES[stored.dtype]
        raise CheckpointError(
            f"{stored.file}: tensor {name} has numbers of {stored.dtype} without scales that are known. "
            f"Read are {READ}."
        )

    def file(self, name: str) -> Path:
        """The file a tensor is in."""
        return (self._quantized.get(name) or self._stored[name]).file

    def read(self, name: str, index: int | None = None) -> np.ndarray:
        """A tensor, or one index of its first axis: only those bytes. Raises CheckpointError naming the file."""
        if name in self._quantized:
            return self._quantized[name].read(self._numbers, index)
        return self._numbers(self._stored[name], index)

    def packed(self, name: str) -> PackedForm | None:
        """The form in which ranks can hold a matrix as it is published, as far as the headers show; None where there is
        none."""
        return self._quantized[name].packed if name in self._quantized else None

    def read_planes(self, name: str, index: int | None = None) -> Planes:
        """As `read`, for a matrix with a `packed` form: its numbers as they are stored, and what scales them."""
        return self._quantized[name].read_planes(self._numbers, index)

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
                f"{self.file(name)}: tensor {name} has shape {found}, but {self.config} says {shape} "
                f"(it makes {purpose}). The two belong to different models."
            )
        self.dtype(name)
        if name in self._quantized:
            self._quantized[name].check()

    def is_void_bias(self, name: str) -> bool:
        """True for a bias of nothing but zeros beside a matrix of GPTQ, whose tools write one for every matrix."""
        stem = name.removesuffix(".bias")
        return stem != name and f"{stem}.qweight" in self._stored and not self.read(name).any()

    @staticmethod
    def _numbers(stored: StoredTensor, index: int | None = None) -> np.ndarray:
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
                f"{stored.file} ends within tensor {stored.name}: {raw.size} of its {wanted} bytes are there. "
                "Fetch it again."
            )
        return raw.view(dtype).reshape(shape)


def is_safetensors_folder(folder: Path) -> bool:
    """True for a folder that holds safetensors."""
    return (folder / INDEX).is_file() or any(folder.glob("*.safetensors"))


def _files(folder: Path) -> list[Path]:
    """The files of a folder without an index."""
    if config_file(folder).name == FILE:
        files = sorted(folder.glob("consolidated*.safetensors")) or sorted(folder.glob("*.safetensors"))
    else:
        single = folder / "model.safetensors"
        files = [single] if single.is_file() else sorted(folder.glob("*.safetensors"))
        # A second copy of the weights in the form of the model's authors, under other names, as Mistral publishes it.
        files = [file for file in files if not file.name.startswith("consolidated")] or files
    if not files:
        raise _no_safetensors(folder)
    return files


def _index_file(folder: Path) -> Path | None:
    """The index of a folder; None where there is none."""
    names = (OWN_INDEX, INDEX) if config_file(folder).name == FILE else (INDEX,)
    return next((folder / name for name in names if (folder / name).is_file()), None)


def _places(index: Path) -> dict[str, str]:
    """The file of each tensor, as an index says."""
    try:
        return dict(json.loads(index.read_text("utf-8-sig"))["weight_map"])
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{index} cannot be read: {type(error).__name__}: {error}.") from error


def _indexed_files(index: Path, places: Mapping[str, str]) -> list[Path]:
    files = [index.parent / name for name in sorted(set(places.values()))]
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
                f"{file}: tensor {name} has numbers of {entry['dtype']}, which are not read. Read are {READ}."
            )
        start = 8 + size + entry["data_offsets"][0]
        stored[name] = StoredTensor(name, file, entry["dtype"], tuple(entry["shape"]), start)
    return stored


def _no_safetensors(folder: Path) -> CheckpointError:
    """The error for a folder without safetensors, which says how to get some."""
    pickled = sorted(file.name for pattern in PICKLED for file in folder.glob(pattern))
    if not pickled:
        return CheckpointError(f"{folder} holds no safetensors.")
    return CheckpointError(
        f"{folder} holds no safetensors, but {pickled[0]}: pickled weights, which can run code when they are read, are "
        "not read. Write them as safetensors with transformers: AutoModelForCausalLM.from_pretrained(FOLDER, "
        'dtype="auto").save_pretrained(NEW_FOLDER), and copy the tokenizer\'s files.'
    )


def _quantization(folder: Path) -> tuple[Callable[[str], Scheme | None], np.dtype]:
    """The scheme of each module, and the number format of the model, as config.json says."""
    try:
        _, fields = decoder_fields(read_config_values(folder), str(config_file(folder)))
    except InputError:
        return Quantization().covering, BFLOAT16  # read_config says what is wrong with config.json
    dtype = fields.values.get("torch_dtype") or fields.values.get("dtype")
    wide = {"float32": np.dtype(np.float32), "float16": np.dtype(np.float16)}.get(str(dtype), BFLOAT16)
    try:
        given = fields.nested("quantization_config") or fields.nested("compression_config")
        return (read_quantization(given) if given is not None else Quantization()).covering, wide
    except InputError as error:
        reason = str(error).split("; pass --weights")[0].rstrip(".")
        raise CheckpointError(f"{reason}; weights in this form are not read. Read are {READ}.") from error
