"""What commands print for people: lines of at most WIDTH columns, and a name before its shortened id.

Programs read --json, which has everything whole. Columns are counted as a terminal counts them: a letter of
some scripts takes two.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from rich.cells import cell_len, set_cell_size

from tapestry.node.errors import printable

WIDTH = 80  # of a terminal that nobody made wider
NAME_COLUMNS = 20  # of the 64 characters that a name may have; guess: tells members apart
_PEER_ID = re.compile(r"\b12D3KooW[1-9A-HJ-NP-Za-km-z]{44}\b")


def short(peer_id: str) -> str:
    """As everywhere: the last letters of a peer id, which differ most."""
    return f"…{peer_id[-6:]}"


def who(peer_id: str, name: str = "") -> str:
    """`lab-hanoi …kT4mQz`."""
    return " ".join(filter(None, [cut(printable(name), NAME_COLUMNS), short(printable(peer_id))]))


def ids_cut(text: str) -> str:
    """The text with each peer id in it as `short` has it."""
    return _PEER_ID.sub(lambda found: short(found[0]), text)


def cut(text: str, columns: int) -> str:
    """At most so wide; what is cut off is shown by a `…`."""
    return text if cell_len(text) <= columns else set_cell_size(text, columns - 1).rstrip() + "…"


def column(text: str, columns: int) -> str:
    """Exactly so wide."""
    return set_cell_size(cut(text, columns), columns)


def wrapped(text: str, first: str = "", then: str = "") -> Iterator[str]:
    """Lines of WIDTH, broken between words; a word that is longer is broken too. The first line begins with
    `first`, the others with `then`."""
    line, begun = first, False
    for word in text.split():
        while True:
            glue = " " if begun else ""
            room = WIDTH - cell_len(line) - len(glue)
            if cell_len(word) <= room:
                line, begun = f"{line}{glue}{word}", True
                break
            if not begun:
                piece = set_cell_size(word, room).rstrip()
                line, word = line + piece, word[len(piece) :]
            yield line
            line, begun = then, False
    if begun or not text.strip():
        yield line.rstrip()
