"""Three kinds of text that every machine with this project has, for members that differ; nothing is fetched.

python   the sources of the standard library
headers  the C++ headers that torch ships, without the generated ones
prose    English: what installed packages say of themselves, and the reference that pydoc shows

Of each kind a bounded part is copied into a folder of its own, a file per document, to train on; another
part, of other documents, is held out.
"""

from __future__ import annotations

import contextlib
import importlib.util
import random
import re
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import distributions
from pathlib import Path
from typing import TypeVar

TRAIN_BYTES = 400_000  # 100,000 tokens or more: no window is seen twice in a story of 15 minutes
HELD_OUT_BYTES = 40_000
HELD_OUT_FILE_CHARS = 2_000  # four windows of 128 tokens: 5 s of one core for a base of 135M parameters
DOCUMENT_CHARS = (200, 6_000)  # shorter ones say little; of longer ones the beginning, for variety
PARAGRAPH_CHARS_MIN = 120
LETTERS_SHARE_MIN = 0.85  # of a paragraph of prose, blanks included: tables and code have less

Found = Callable[[random.Random], Iterator[str]]  # documents, in an order that the seed gives
Ordered = TypeVar("Ordered", Path, str)


DECLARATION = "the authors of this machine's packages, those of the packages, open"  # for --declare


class NoText(Exception):
    """A kind of text that this machine has too little of; one line."""


@dataclass(frozen=True)
class Text:
    """What one member trains on, and what is held out."""

    name: str
    what: str
    folder: Path  # to train on
    trained: str  # what lies there
    held_out: str
    held_out_file: Path  # the beginning of it, for the node to measure every epoch


def copied_texts(place: Path, seed: int) -> list[Text]:
    """Write all three kinds below `place`. Raises NoText and OSError."""
    return [_copied(name, what, found, place, seed) for name, (what, found) in KINDS.items()]


def _copied(name: str, what: str, found: Found, place: Path, seed: int) -> Text:
    documents = _bounded(found(random.Random(seed)))
    held_out = _taken(documents, HELD_OUT_BYTES)
    train = _taken(_apart(documents, held_out), TRAIN_BYTES)
    if sum(map(len, train)) < TRAIN_BYTES / 4:
        raise NoText(f"this machine has too little {what}: {sum(map(len, train))} characters")
    folder = place / name
    folder.mkdir(parents=True)
    for index, document in enumerate(train):
        (folder / f"{index:04}.txt").write_text(document, encoding="utf-8")
    text = Text(name, what, folder, "\n\n".join(train), "\n\n".join(held_out), place / f"held-out-{name}.txt")
    text.held_out_file.write_text(text.held_out[:HELD_OUT_FILE_CHARS], encoding="utf-8")
    return text


def _bounded(found: Iterator[str]) -> Iterator[str]:
    """None twice, none too short, and of long ones the beginning."""
    seen = set()
    for text in found:
        text = text[: DOCUMENT_CHARS[1]]
        if len(text) >= DOCUMENT_CHARS[0] and text not in seen:
            seen.add(text)
            yield text


def _apart(documents: Iterator[str], held_out: list[str]) -> Iterator[str]:
    """Neither a part of what is held out, nor with one of these in it: pydoc's topics quote each other."""
    whole = "\n\n".join(held_out)
    for text in documents:
        if text not in whole and not any(one in text for one in held_out):
            yield text


def _taken(documents: Iterator[str], limit_bytes: int) -> list[str]:
    """The next ones, until they are as long as that."""
    taken, size_bytes = [], 0
    while size_bytes < limit_bytes and (text := next(documents, None)) is not None:
        taken.append(text)
        size_bytes += len(text.encode())
    return taken


def _python_sources(rng: random.Random) -> Iterator[str]:
    library = Path(sysconfig.get_path("stdlib"))
    without = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "pydoc_data"}
    paths = [p for p in library.rglob("*.py") if not without & set(p.relative_to(library).parts)]
    return _read(paths, rng)


def _torch_headers(rng: random.Random) -> Iterator[str]:
    spec = importlib.util.find_spec("torch")  # found, not imported
    include = Path(spec.origin).parent / "include" if spec and spec.origin else Path("/nonexistent")
    return _read([path for part in ("c10", "torch") for path in (include / part).rglob("*.h")], rng)


def _read(paths: list[Path], rng: random.Random) -> Iterator[str]:
    """In an order that the seed gives; what is not UTF-8 is left out."""
    for path in _shuffled(paths, rng):
        with contextlib.suppress(OSError, UnicodeDecodeError):
            yield path.read_text(encoding="utf-8")


def _package_prose(rng: random.Random) -> Iterator[str]:
    texts = [str(package.metadata.json.get("description") or "") for package in distributions()]
    if importlib.util.find_spec("pydoc_data"):  # some systems leave it out
        from pydoc_data.topics import topics

        texts += topics.values()
    return map(_prose_of, _shuffled(texts, rng))


def _shuffled(items: Iterable[Ordered], rng: random.Random) -> list[Ordered]:
    ordered = sorted(items)
    rng.shuffle(ordered)
    return ordered


def _prose_of(text: str) -> str:
    return "\n\n".join(p for p in re.split(r"\n\s*\n", text) if _is_prose(p))


def _is_prose(paragraph: str) -> bool:
    letters = sum(c.isalpha() or c.isspace() for c in paragraph)
    return len(paragraph) >= PARAGRAPH_CHARS_MIN and letters >= LETTERS_SHARE_MIN * len(paragraph)


KINDS: dict[str, tuple[str, Found]] = {
    "python": ("Python sources", _python_sources),
    "headers": ("C++ headers", _torch_headers),
    "prose": ("English prose", _package_prose),
}
