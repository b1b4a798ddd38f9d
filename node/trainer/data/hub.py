"""Data sets of a hub: `hub:OWNER/NAME` as a folder of files on this disk.

`huggingface_hub` keeps what it downloads in its cache and finds it there again without a network: `start`
asks the hub once, the trainer never does (trainer/process.py tells it so). Only files are taken; a data set
that is a program is not run.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tapestry.node.trainer.data.errors import DataError

WANTED = tuple(
    f"*{suffix}{packing}"
    for suffix in (".parquet", ".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".txt", ".arrow", ".md")
    for packing in ("", ".gz", ".zst")
)
ABOUT = frozenset({"README.md", "dataset_infos.json", "dataset_dict.json"})  # at the top; no data


def snapshot_download(*args: Any, **more: Any) -> str:
    """The library's, imported when it is needed."""
    import huggingface_hub

    path: str = huggingface_hub.snapshot_download(*args, **more)
    return path


def folder_of(repository: str, revision: str | None) -> Path:
    """The folder of the snapshot, in the cache of `huggingface_hub`. Raises DataError."""
    try:
        path = snapshot_download(
            repository, repo_type="dataset", revision=revision, allow_patterns=list(WANTED)
        )
    except (
        Exception
    ) as error:  # of many kinds: network, permission, nothing of this name, nothing in the cache
        first = str(error).strip().partition("\n")[0][:200]
        raise DataError(
            f"--data hub:{repository}: neither the hub nor its cache on this disk gives it: "
            f"{first or type(error).__name__}"
        ) from error
    return Path(path)
