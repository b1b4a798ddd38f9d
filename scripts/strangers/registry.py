"""The attacks of strangers by the names by which scripts/attack.py knows them: what it does, its function.

Another file of attacks is another name in the first import: they name themselves.
"""

from __future__ import annotations

from strangers import endpoint, peers  # noqa: F401
from strangers.target import ATTACKS as ATTACKS
