"""How much each part of a node says, changed while it runs.

`tapestry log-level links debug` writes HOME/log-levels.json; the node looks at that file each second, from
the thread that writes its log, and sets the levels. So it needs neither the endpoint nor a token nor a
signal, works across containers, and stays as it was put over restarts.
"""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path

from tapestry.node.disk.files import atomic_write
from tapestry.node.protocol import strict

LEVELS = ("debug", "info", "warning", "error")
USUAL = "info"
FILE_BYTES_MAX = 4096
SUBSYSTEMS = {
    "all": "everything that is not named here by itself",
    "node": "rounds, phases, the trainer",
    "links": "connections with other members",
    "network": "p2pd's life, presence, where this node can be reached",
    "swarm": "streams, bans, the way into the DHT",
    "directory": "presence records in the DHT",
    "p2pd": "what the libp2p daemon prints: only with debug",
    "join": "which run this node is of",
    "audit": "means of others that are computed again",
    "transfer": "states and updates from and for others",
    "base": "files of the base that the run continues",
    "keeper": "what is restored from disk",
    "disk": "the chain, updates and checkpoints on disk",
    "history": "the page's past",
    "http": "the endpoint",
    "trackers": "TensorBoard, wandb, trackio",
    "otel": "the way to an OpenTelemetry collector",
    "log": "this log itself",
}

_log = logging.getLogger("tapestry.log")


def read_levels(path: Path) -> dict[str, str]:
    """Level by subsystem; {} if there is no file. Raises ValueError, OSError."""
    try:
        with path.open("rb") as file:
            table = json.loads(file.read(FILE_BYTES_MAX))
    except FileNotFoundError:
        return {}
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if not isinstance(table, dict):
        raise ValueError("not a table")
    for subsystem, level in table.items():
        strict.text(level, 16, subsystem)
        if subsystem not in SUBSYSTEMS or level not in LEVELS:
            raise ValueError(f"{subsystem} = {level} is not a subsystem and its level")
    return table


def write_level(path: Path, subsystem: str, level: str) -> dict[str, str]:
    """Set one; the usual level needs no entry. Gives all of them. Raises ValueError, OSError."""
    levels = read_levels(path)
    levels.pop(subsystem, None)
    if level != USUAL or (subsystem != "all" and levels.get("all", USUAL) != USUAL):
        levels[subsystem] = level
    atomic_write(path, json.dumps(levels, indent=1).encode() + b"\n", 0o600)
    return levels


class WatchedLevels:
    """The file of one home, followed. `look` is called by one thread, about each second."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._seen: tuple[int, int, int] | None = None
        self._levels: dict[str, str] = {}

    def look(self) -> None:
        """Set what has changed."""
        try:
            found = os.stat(self._path)
            seen = (found.st_ino, found.st_mtime_ns, found.st_size)
        except OSError:
            seen = None
        if seen == self._seen:
            return
        self._seen = seen
        try:
            levels = read_levels(self._path)
        except (ValueError, OSError) as error:
            is_foreign = isinstance(error, PermissionError)
            _log.warning(
                "levels=not_read path=%s reason=%r next=%r",
                self._path,
                str(error),
                "give it to this node's user: chown, as root"
                if is_foreign
                else "remove it, and set them again",
            )
            return
        for subsystem in sorted(levels.keys() | self._levels.keys()):
            if levels.get(subsystem) != self._levels.get(subsystem):
                self._set(subsystem, levels.get(subsystem))
        self._levels = levels

    def _set(self, subsystem: str, level: str | None) -> None:
        everything = subsystem == "all"
        logger = logging.getLogger("tapestry" if everything else f"tapestry.{subsystem}")
        if level is None:
            logger.setLevel(logging.INFO if everything else logging.NOTSET)
        else:
            logger.setLevel(level.upper())
        _log.info("levels=changed of=%s to=%s", subsystem, level or USUAL)
