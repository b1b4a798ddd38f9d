"""What goes wrong with data."""

from __future__ import annotations


class DataError(ValueError):
    """The data cannot be used; one line that says what to do."""


class DamagedFile(Exception):
    """A file cannot be read to its end; the message says why. What came before the damage counts."""
