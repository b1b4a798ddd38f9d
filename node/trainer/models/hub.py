"""A hub id -> a folder on this disk, through huggingface_hub: downloaded, or from its cache when offline.

Only the files that a base is made of are fetched; no code among them. HF_HUB_OFFLINE, HF_HOME and HF_TOKEN
are huggingface_hub's own and mean what they always do. A name that is a folder here is that folder.
"""

from __future__ import annotations

import re
from pathlib import Path

from tapestry.node.trainer.models.refusal import ModelError

PATTERNS = (
    "*.safetensors",
    "*.safetensors.index.json",
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "README.md",
    "LICENSE*",
)
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+", re.ASCII)


def fetch(source: str | Path) -> Path:
    """The folder of a base. Raises ModelError: no such folder, and no such id within reach."""
    folder = Path(source).expanduser()
    if isinstance(source, Path) or folder.exists() or not _HUB_ID.fullmatch(source):
        if not folder.exists():
            raise ModelError(f"there is no folder {folder}", "name a Hugging Face directory or a hub id")
        return folder.absolute()
    return _snapshot(source)


def _snapshot(hub_id: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError
    from huggingface_hub.utils.tqdm import disable_progress_bars

    disable_progress_bars()
    try:
        return Path(snapshot_download(hub_id, allow_patterns=list(PATTERNS)))
    except LocalEntryNotFoundError as error:
        raise ModelError(
            f"{hub_id} is neither a folder here nor in the cache, and the hub cannot be reached",
            "download it where there is a network, and name the folder",
        ) from error
    except Exception as error:  # whatever its HTTP library raises
        text = " ".join(str(error).split())[:200]
        raise ModelError(f"cannot get {hub_id} from the hub: {text}") from error
