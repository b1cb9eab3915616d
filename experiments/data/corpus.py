"""Text as documents: read from a file or folder, and held out so that no part sees another."""

from __future__ import annotations

import hashlib
import logging
import sysconfig
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

logger = logging.getLogger(__name__)

STDLIB = "stdlib"  # as a path: the source of this Python's standard library
# From so many files and folders on, whole ones are held out; of fewer, the end of each.
_MANY = 20


@dataclass(frozen=True)
class Document:
    """One file: its path below the root, and its bytes, which are valid UTF-8."""

    name: str
    text: bytes

    @property
    def group(self) -> str:
        """The file or folder right below the root that it lies in."""
        return self.name.split("/", 1)[0]


@dataclass(frozen=True)
class Parts:
    """Documents to train on, to validate on and to test on."""

    train: list[Document]
    val: list[Document]
    test: list[Document]

    def size(self, part: str) -> int:
        """Bytes of a part, by its name."""
        return _size(getattr(self, part))


def documents(path: str | Path, pattern: str = "*", exclude: Iterable[str] = ()) -> list[Document]:
    """The text of a file, or of all files of a folder, by name; each content once.

    Args:
        path: a file, a folder (searched in depth), or `stdlib`.
        pattern: of the names of files in a folder, such as `*.py`.
        exclude: names of folders to leave out, wherever they lie; hidden ones always are.

    Raises: FileNotFoundError for no such path, or no text in it; ValueError for a file that is not
    UTF-8 (in a folder, such files are passed over).
    """
    root = Path(sysconfig.get_path("stdlib")) if str(path) == STDLIB else Path(path)
    if root.is_file():
        text = root.read_bytes()
        if not _is_text(text):
            raise ValueError(f"{root} is no UTF-8 text: convert it, or leave it out")
        return [Document(root.name, text)]
    if not root.is_dir():
        raise FileNotFoundError(f"data.path={path}: no such file or folder")
    left_out = set(exclude)
    found: dict[bytes, Document] = {}
    files = [file for file in sorted(root.rglob(pattern)) if file.is_file()]
    for file in files:
        below = file.relative_to(root)
        if any(part in left_out or part.startswith(".") for part in below.parts):
            continue
        text = file.read_bytes()
        if text and _is_text(text):
            # A second copy would let a file of one part be seen in another.
            found.setdefault(hashlib.sha256(text).digest(), Document(below.as_posix(), text))
    if not found:
        raise FileNotFoundError(f"no UTF-8 text in files {pattern!r} under {root}")
    return list(found.values())


def split(found: Sequence[Document], val: float, test: float) -> Parts:
    """Hold out shares of the bytes for validation and test; the same ones for every seed.

    With many files: whole ones, in an order that a hash of their names gives; files of one folder
    below the root go together, since neighbours resemble each other. With fewer: the end of each,
    cut between lines: text to train on, then to validate on, then to test on.

    Raises: ValueError where the shares leave nothing to train on, or a part that was asked for
    would be empty.
    """
    if not (0 <= val < 1 and 0 <= test < 1 and val + test < 1):
        raise ValueError(f"val_fraction={val} and test_fraction={test} leave nothing to train on")
    whole = len({document.group for document in found}) >= _MANY
    parts = (_by_file if whole else _by_end)(found, val, test)
    for name, share in (("train", 1.0), ("val", val), ("test", test)):
        if share and not parts.size(name):
            raise ValueError(
                f"{len(found)} files of {_size(found)} bytes give no text for {name}: give more "
                "text or larger fractions"
            )
    how = "whole files" if whole else "the end of each file"
    sizes = ", ".join(f"{name} {parts.size(name):,}" for name in ("train", "val", "test"))
    logger.info("%d files, held out by %s; bytes: %s", len(found), how, sizes)
    return parts


def _by_file(found: Sequence[Document], val: float, test: float) -> Parts:
    total = _size(found)
    groups: dict[str, list[Document]] = {}
    for document in found:
        groups.setdefault(document.group, []).append(document)
    order = sorted(groups, key=lambda name: hashlib.sha256(name.encode()).digest())
    taken: list[list[Document]] = []
    for share in (test, val):
        part: list[Document] = []
        for name in list(order):
            room = 1.25 * share * total - _size(part)  # one large folder must not fill the part
            if _size(part) < share * total and _size(groups[name]) <= room:
                part += groups[name]
                order.remove(name)
        taken.append(part)
    left = set(order)
    return Parts([d for d in found if d.group in left], val=taken[1], test=taken[0])


def _by_end(found: Sequence[Document], val: float, test: float) -> Parts:
    parts = Parts([], [], [])
    for document in found:
        text, size = document.text, len(document.text)
        first = _line(text, round(size * (1 - val - test))) if val + test else size
        second = max(first, _line(text, round(size * (1 - test)))) if test else size
        pieces = (text[:first], text[first:second], text[second:])
        for part, piece in zip((parts.train, parts.val, parts.test), pieces, strict=True):
            if piece:
                part.append(Document(document.name, piece))
    return parts


def _line(text: bytes, position: int) -> int:
    """The start of the line after a position; where none is near, of a character."""
    end = text.find(b"\n", position, position + 4096)
    if end >= 0:
        return end + 1
    while position < len(text) and text[position] & 0xC0 == 0x80:  # inside a UTF-8 sequence
        position += 1
    return position


def _size(found: Iterable[Document]) -> int:
    return sum(len(document.text) for document in found)


def _is_text(text: bytes) -> bool:
    try:
        text.decode()
    except UnicodeDecodeError:
        return False
    return b"\0" not in text
