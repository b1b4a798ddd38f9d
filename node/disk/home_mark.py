"""Which home this is, and where it belongs: HOME/home.json, so that a copy is not taken for the original.

    {"format": 1, "id": 32 hex digits, "path": "/srv/tapestry", "machine": ..., "restored_at": ""}

Two nodes with one key disturb each other and their run. On one machine a copied home is known by its mark:
the folder it was copied from is still there, with the same id. A home that was moved, or that came from
another machine or a backup, is told so and goes on; whether the other one still runs is asked of the run
itself (net/twins.py).

The number of the format grows when a home of this version could not be read by earlier ones.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import secrets
from dataclasses import dataclass, replace
from pathlib import Path

from blake3 import blake3

from tapestry.node.disk.files import atomic_write
from tapestry.node.errors import ExitCode, UserError
from tapestry.node.home import Home
from tapestry.node.protocol import strict

FORMAT = 1
MARK_BYTES_MAX = 16 << 10
_MACHINE_ID = Path("/etc/machine-id")  # machine-id(5)

_log = logging.getLogger("tapestry.disk")


@dataclass(frozen=True, slots=True)
class Mark:
    """What HOME/home.json says."""

    format: int
    id: str  # made once; a copy has the same
    path: str  # where it was when a node ran in it last
    machine: str  # a digest of the machine's id; "" where it has none
    # UTC, until the run was found again, or a record names this disk; "" if not restored
    restored_at: str = ""


def read_mark(home: Home) -> Mark | None:
    """None of a home that has none. Raises UserError if it is damaged, or of a later version."""
    try:
        with home.mark.open("rb") as file:
            table = json.loads(file.read(MARK_BYTES_MAX))
        if isinstance(table, dict) and isinstance(table.get("format"), int) and table["format"] > FORMAT:
            raise UserError(
                f"{home.path} was made by a later version of tapestry (format {table['format']}, this one "
                f"knows {FORMAT})",
                exit_code=ExitCode.REFUSED,
                hint="install that version again; or restore a backup of before the upgrade",
            )
        strict.table(table, [field.name for field in dataclasses.fields(Mark)], "home.json")
        strict.integer(table["format"], 1, FORMAT, "format")
        for name in ("id", "path", "machine", "restored_at"):
            strict.text(table[name], MARK_BYTES_MAX, name)
        return Mark(**table)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"cannot read {home.mark}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{home.mark} is damaged: {error}", hint="remove it: it is made again") from error


def claim(home: Home, machine: str | None = None) -> Mark:
    """For a node that starts here, with the lock held: its mark, brought up to date.

    Raises UserError for a copy of a home that is still there, and for one of a later version; OSError.
    """
    machine, path = _machine() if machine is None else machine, str(home.path)
    mark = require_original(home)
    if mark is None:
        mark = new_mark(home, machine)
    elif (mark.path, mark.machine) != (path, machine):
        _log.info("home=moved from=%s to=%s; the node there must not run any more", mark.path, path)
        mark = replace(mark, path=path, machine=machine)
    write_mark(home, mark)
    home.exit_mark.unlink(missing_ok=True)
    return mark


def require_original(home: Home) -> Mark | None:
    """Its mark. Raises UserError for a copy of a home that is still there, and as `read_mark` does."""
    mark = read_mark(home)
    if mark is not None and mark.path != str(home.path) and _is_copy_of(home, mark):
        raise UserError(
            f"{home.path} is a copy of {mark.path}, which is still there: two nodes with one key would "
            "disturb their run",
            exit_code=ExitCode.REFUSED,
            hint=f"start that one; or, if this one is to take its place: tapestry stop --home {mark.path}; "
            f"mv {mark.path} {mark.path}.away, never to be started again; or make this one a member of its "
            f"own: rm {home.identity_key} {home.vote} {home.mark}",
        )
    return mark


def new_mark(home: Home, machine: str = "") -> Mark:
    """Of a home that has none."""
    return Mark(FORMAT, secrets.token_hex(16), str(home.path), machine)


def write_mark(home: Home, mark: Mark) -> None:
    """Raises OSError."""
    data = json.dumps(dataclasses.asdict(mark), indent=1).encode() + b"\n"
    try:
        same = home.mark.read_bytes() == data
    except OSError:
        same = False
    if not same:
        atomic_write(home.mark, data, 0o600)


def _is_copy_of(home: Home, mark: Mark) -> bool:
    """Whether the folder that the mark names is another one, with the same mark."""
    other = Home(Path(mark.path))
    try:
        if os.path.samefile(home.path, other.path):
            return False  # another way to the same folder
        theirs = json.loads(other.mark.read_bytes()[:MARK_BYTES_MAX])
        return isinstance(theirs, dict) and theirs.get("id") == mark.id and other.identity_key.exists()
    except (OSError, ValueError, RecursionError):
        return False


def _machine() -> str:
    """Not the id itself, which is nobody's affair."""
    try:
        text = _MACHINE_ID.read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        return ""
    return blake3(b"tapestry home " + text.encode()).hexdigest()[:32] if text else ""
