"""manifest.json of an export: every file of it with size and blake3 digest, itself sealed.

It finds damage: a flipped bit in any file, a file that is missing or was added. It proves nothing against who
meant to deceive, for anybody can write another manifest; the tensors are proven by the chain (verify.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from tapestry.node.disk.base import BaseFile
from tapestry.node.disk.files import seal, unseal
from tapestry.node.protocol import strict

NAME = "manifest.json"
LINEAGE = "lineage"  # the folder of an export that holds genesis and records
FILES_MAX = 100_000  # guess: a model of 5 TB has 1,000
BYTES_MAX = 64 << 20


def write_manifest(folder: Path) -> None:
    """Of all files that are below `folder` now. Raises OSError."""
    files = {}
    for path in _files(folder):
        found = BaseFile.of(path)
        files[path.relative_to(folder).as_posix()] = [found.size_bytes, found.digest]
    (folder / NAME).write_bytes(seal({"files": files}) + b"\n")


def check_manifest(folder: Path) -> Iterator[tuple[str, str]]:
    """File and what is wrong with it, for each that does not hold. Raises OSError."""
    try:
        with (folder / NAME).open("rb") as file:
            data = file.read(BYTES_MAX)
        files = strict.table(unseal(data[:-1]), ("files",), "a manifest")["files"]
        if seal({"files": files}) + b"\n" != data:
            raise ValueError("not in the form in which it was written")
        listed = {name: (size, digest) for name, (size, digest) in files.items()}
    except (ValueError, TypeError, AttributeError) as error:
        yield NAME, str(error)
        return
    there = {path.relative_to(folder).as_posix(): path for path in _files(folder)}
    for name in sorted({*listed, *there}):
        if name not in there:
            yield name, "is missing"
        elif name not in listed:
            yield name, "is not in the manifest"
        else:
            found = BaseFile.of(there[name])
            if (found.size_bytes, found.digest) != listed[name]:
                yield name, f"has the digest {found.digest[:12]}, not {str(listed[name][1])[:12]}"


def digests_of(folder: Path, but: tuple[str, ...] = ()) -> dict[str, str]:
    """By name, of every file below `folder` that is not the manifest, nor one of `but`. Raises OSError."""
    named = {path.relative_to(folder).as_posix(): path for path in _files(folder)}
    return {name: BaseFile.of(path).digest for name, path in named.items() if name not in but}


def _files(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.rglob("*")) if path.is_file() and path != folder / NAME]
