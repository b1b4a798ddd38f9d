"""Which ids a base's tokenizer may give: none for which the embedding has no row.

tokenizer.json and tokenizer_config.json may come from a peer. They are parsed, never executed.
"""

from __future__ import annotations

from pathlib import Path

from tapestry.node.trainer.models.folder import read_json
from tapestry.node.trainer.models.refusal import ModelError, one_line
from tapestry.node.trainer.tokenizers.panics import panics_caught

TOKENIZER = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
TOKENIZER_BYTES_MAX = 64 << 20  # Gemma 3's, of 262,144 ids, has 33 MB
TOKENIZER_CONFIG_BYTES_MAX = 8 << 20  # Gemma 3's has 1.2 MB


def check_tokenizer(folder: Path, rows: int) -> int:
    """The number of ids that tokenizer.json may give; at most `rows`. Raises ModelError.

    More rows than ids are usual: tables are padded to a multiple of 64 or so.
    """
    from tokenizers import Tokenizer

    path = folder / TOKENIZER
    if not path.is_file():
        raise ModelError(
            f"{folder} holds no {TOKENIZER}",
            "transformers makes one of an older kind: AutoTokenizer.from_pretrained(A).save_pretrained(B)",
        )
    read_json(path, TOKENIZER_BYTES_MAX)
    try:
        with panics_caught():
            ids = Tokenizer.from_file(str(path)).get_vocab(with_added_tokens=True).values()
    except Exception as error:  # tokenizers raises nothing narrower
        raise ModelError(f"{path} does not read: {one_line(error)}") from error
    highest = max([*ids, *_declared_ids(folder)], default=-1)
    if highest >= rows:
        raise ModelError(
            f"{path} gives ids up to {highest}, the embedding has {rows} rows",
            "resize the embedding to the tokenizer first (transformers: model.resize_token_embeddings)",
        )
    return highest + 1


def _declared_ids(folder: Path) -> list[int]:
    """Of added tokens in tokenizer_config.json."""
    path = folder / TOKENIZER_CONFIG
    if not path.is_file():
        return []
    table = read_json(path, TOKENIZER_CONFIG_BYTES_MAX)
    if table.get("auto_map"):
        raise ModelError(f"{path} asks for remote code (auto_map), which is never run")
    added = table.get("added_tokens_decoder")
    ids = [key for key in added if key.isascii() and key.isdigit()] if isinstance(added, dict) else []
    return [int(key) for key in ids if len(key) < 12]
