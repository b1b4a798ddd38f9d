"""A home as it is at this moment, beside it: links to the files that never change, a copy of the chain.

Must not import torch: commands ask what may be asked before they load it.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from tapestry.node.home import Home


def snapshot(home: Home, folder: Path) -> Home:
    """A home of links to this one's files: nothing of this one is written, or moved when it turns out bad."""
    folder.mkdir()
    copy = Home(folder)
    for source, target in (
        (home.chain_marks, copy.chain_marks),  # what is older than the chain is what is believed of it
        (home.chain_index, copy.chain_index),
        (home.genesis, copy.genesis),
        (home.chain, copy.chain),
    ):
        if source.exists():
            shutil.copyfile(source, target)
    for source, target in ((home.checkpoints, copy.checkpoints), (home.updates, copy.updates)):
        target.mkdir()
        for path in sorted(source.glob("*")) if source.exists() else ():
            if path.suffix in (".safetensors", ".upd"):
                _link(path, target / path.name)
    return copy


def _link(path: Path, target: Path) -> None:
    """A hard link, which outlives a pruning node; else, on another disk, a symbolic one."""
    try:
        os.link(path, target)
    except FileNotFoundError:
        return  # pruned a moment ago
    except OSError:
        target.symlink_to(path)
