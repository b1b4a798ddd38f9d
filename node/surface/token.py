"""The endpoint's token: who reaches it from another machine has to show it.

Only where the endpoint is bound beyond loopback. It lies in HOME/http.token, for its owner alone, and is
shown once, when it is made. `Authorization: Bearer TOKEN` for scrapers; browsers ask for a password.
"""

from __future__ import annotations

import base64
import binascii
import hmac
import secrets
import stat
from dataclasses import dataclass
from pathlib import Path

from tapestry.node.disk.files import atomic_write
from tapestry.node.errors import UserError

TOKEN_BYTES = 32
FILE_BYTES_MAX = 1024


@dataclass(frozen=True, slots=True)
class Token:
    text: str
    path: Path
    new: bool = False  # made just now, so that it is to be shown

    @classmethod
    def load_or_create(cls, path: Path) -> Token:
        """Raises UserError if others could read it, or if there is none in it; OSError."""
        try:
            mode = path.stat().st_mode
            with path.open("rb") as file:
                text = file.read(FILE_BYTES_MAX).decode("ascii", "replace").strip()
        except FileNotFoundError:
            return cls._create(path)
        if stat.S_IMODE(mode) & 0o077:
            raise UserError(
                f"{path} can be read by other users of this machine",
                hint=f"rm {path}: the next start makes another token",
            )
        if len(text) < TOKEN_BYTES or not text.isprintable():
            raise UserError(f"there is no token in {path}", hint=f"rm {path}: the next start makes one")
        return cls(text, path)

    @classmethod
    def _create(cls, path: Path) -> Token:
        text = secrets.token_urlsafe(TOKEN_BYTES)
        atomic_write(path, text.encode() + b"\n", mode=0o600)
        return cls(text, path, new=True)

    def is_in(self, authorization: str) -> bool:
        """Whether this Authorization header shows it; the time that takes says nothing of the token."""
        scheme, _, value = authorization.partition(" ")
        shown = value.strip()
        if scheme.lower() == "basic":
            shown = _password(shown)
        elif scheme.lower() != "bearer":
            shown = ""
        return hmac.compare_digest(shown.encode("utf-8", "surrogateescape"), self.text.encode())


def bearer(path: Path) -> dict[str, str]:
    """The header with which a command of this home asks its own node; none if there is no token."""
    try:
        return {"Authorization": f"Bearer {path.read_bytes()[:FILE_BYTES_MAX].decode('ascii').strip()}"}
    except (OSError, ValueError):
        return {}


def _password(packed: str) -> str:
    """Of HTTP Basic authentication; the user's name says nothing here."""
    try:
        return base64.b64decode(packed, validate=True).decode("utf-8", "replace").partition(":")[2]
    except (binascii.Error, ValueError):
        return ""
