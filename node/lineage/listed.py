"""derivative.json says of itself, and of the files beside it, what they were when it was written.

    digest  blake3 of all its other keys, as canonical JSON
    files   "DIGEST NAME" of each file of the finished versions, and of those that all versions share

Beside the models' own digests, which are of their tensors alone, this finds a changed bit in a config, a
tokenizer, a recipe, a report or a history, and a file beside a model that is not listed. What was written
before there were these keys has neither. Whoever means to deceive can write both anew: it is the member's own
word, and no signature.

Must not import torch.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from blake3 import blake3

from tapestry.node.disk.base import BaseFile
from tapestry.node.protocol.canon import canonical

NAME = "derivative.json"
OF_A_VERSION = ("model", "adapters", "report.json", "history.json")  # what stays of it; all else is work
LOADED = OF_A_VERSION[:2]  # folders: what lies in them is loaded, so nothing else may
OF_ALL = ("tokens.json", "held-out.jsonl")
KEYS = {"name", "current", "versions", "form"}


def listed(folder: Path, before: Iterable[str], changed: int) -> tuple[str, ...]:
    """The `files` of a derivative's folder, read anew but for those of other versions than `changed`."""
    kept = [line for line in before if _version_of(line) not in (0, changed)]
    paths = [folder / name for name in OF_ALL]
    for name in OF_A_VERSION:
        made = folder / f"v{changed}" / name
        paths += sorted(made.rglob("*")) if made.is_dir() else [made]
    found = [f"{BaseFile.of(p).digest} {p.relative_to(folder).as_posix()}" for p in paths if p.is_file()]
    return (*kept, *found)


def _version_of(line: str) -> int:
    """In whose folder the file is; 0: beside them."""
    first, _, rest = line.partition(" ")[2].partition("/")
    return int(first[1:]) if rest else 0


def digest_of(table: Mapping[str, Any]) -> str:
    """What its key `digest` must say."""
    return blake3(canonical({**table, "digest": ""})).hexdigest()


def text_of(table: Mapping[str, Any]) -> bytes:
    """The only form in which it is written."""
    return json.dumps(table, indent=1, sort_keys=True, allow_nan=False).encode() + b"\n"


def faults(folder: Path) -> Iterator[tuple[str, str]]:
    """File and what is wrong with it. Raises OSError, ValueError, KeyError, TypeError."""
    data = (folder / NAME).read_bytes()
    table = json.loads(data)
    if "files" not in table and table.keys() == KEYS:
        return
    if table.get("digest") != digest_of(table) or text_of(table) != data:
        yield NAME, "it is not what was written"
        return
    known = set()
    for line in table["files"]:
        digest, _, name = str(line).partition(" ")
        known.add(name)
        if not (folder / name).is_file():
            yield name, "is missing"
        elif (found := BaseFile.of(folder / name).digest) != digest:
            yield name, f"has the digest {found[:12]}, not {digest[:12]}"
    listed = {name.partition("/")[0] for name in known}
    for number in (version["number"] for version in table["versions"]):
        if f"v{number}" not in listed:
            continue  # an older node made it, which listed no files
        for path in _loaded(folder / f"v{number}"):
            if (name := path.relative_to(folder).as_posix()) not in known:
                yield name, "no version has such a file; a loader might take it for what was made"


def _loaded(version: Path) -> Iterator[Path]:
    for name in LOADED:
        paths = sorted((version / name).rglob("*"))
        yield from (path for path in paths if path.is_symlink() or not path.is_dir())
