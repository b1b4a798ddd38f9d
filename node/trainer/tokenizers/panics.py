"""A panic of the `tokenizers` library, as an exception.

Where its Rust code comes upon what it did not think of, pyo3 raises PanicException, which is no Exception: a
tokenizer.json that a peer gave would end the process. The class can be imported from nowhere.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class LibraryPanic(Exception):
    """The library gave up; its own words."""


@contextmanager
def panics_caught() -> Iterator[None]:
    """Raises LibraryPanic in the place of a panic."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise LibraryPanic(str(error)) from None
